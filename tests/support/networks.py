"""A small recipe of each network."""

from pathlib import Path

import yaml

LINES = {"class_path": "lm.data.LinesData", "init_args": {"corpus": "words.txt", "block_size": 8, "batch_size": 8}}


WHOLE = {"class_path": "lm.data.LinesData", "init_args": {**LINES["init_args"], "targets": "all"}}


REVERSE = {
    "class_path": "lm.data.ReverseData",
    "init_args": {"alphabet": "abc", "longest_length": 4, "held_out": 10, "batch_size": 8},
}


SUMS = {"class_path": "lm.data.ArithmeticData", "init_args": {"digits": 1, "held_out": 10, "batch_size": 8}}


SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16}


NETWORKS = {
    "MLP": ({"n_hidden": 16, "n_layer": 2}, LINES),
    "WaveNet": ({"n_hidden": 16}, LINES),
    "WaveNet per position": ({"n_hidden": 16, "norm_over_time": False}, LINES),
    "WaveNet dense": ({"n_hidden": 16, "depth": 2, "dense": True}, WHOLE),
    "GatedWaveNet": ({"n_embd": 8, "dropout": 0.1}, WHOLE),
    "BagOfWords": ({"n_embd": 16, "n_hidden": 16}, WHOLE),
    "RNN": ({"n_hidden": 16, "n_layer": 2}, WHOLE),
    "GRU": ({"n_hidden": 16}, WHOLE),
    "LSTM": ({"n_hidden": 16, "dropout": 0.1}, WHOLE),
    "GPT": ({**SMALL, "dropout": 0.1}, WHOLE),
    "GPT separate": ({**SMALL, "attention": "separate", "residual": False, "norm": "none"}, WHOLE),
    "GPT today": ({**SMALL, "positions": "rotary", "norm": "rms", "feed_forward": "swiglu", "qk_norm": True}, SUMS),
    "GPT documents": ({**SMALL, "document_end": 0, "dropout": 0.1, "key_dropout": True}, WHOLE),
    "Seq2Seq": ({**SMALL, "start_token": 1}, REVERSE),
}


def recipe(name: str, **more: object) -> None:
    arguments, data = NETWORKS[name]
    net = {"class_path": f"lm.models.{name.split()[0]}", "init_args": arguments}
    words = ["".join(chr(97 + (7 * i + j) % 26) for j in range(2 + i % 5)) for i in range(120)]
    Path("words.txt").write_text("\n".join(words))
    trainer = {"max_steps": 12, "val_check_interval": 4, "log_every_n_steps": 1, "accelerator": "cpu"}
    model = {"class_path": "lm.training.LanguageModel", "init_args": {"net": net, **more}}
    text = {"trainer": trainer, "model": model, "data": data, "checkpoint": {"every_n_steps": 4}}
    Path("net.yaml").write_text(yaml.safe_dump(text))
