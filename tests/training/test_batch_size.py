"""A run that goes on with another batch size: it goes on in the order of its sequences, and counts what it consumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lm.checkpoints import checkpoint
from lm.cli.fit import Fit
from lm.data.module import TokenData
from lm.training.loggers.log_files import read_csv
from tests.conftest import RECIPE
from tests.support.cases import often
from tests.support.runs import assert_equal

TEXT = {"class_path": "lm.data.TextData"}
DATA: dict[str, dict[str, Any]] = {
    "random": {**TEXT, "init_args": {"corpus": "text.txt", "order": "random"}},
    "permutation": {**TEXT, "init_args": {"corpus": "text.txt", "order": "permutation"}},
    "documents": {
        **TEXT,
        "init_args": {"corpus": "rows.jsonl", "order": "permutation", "across_documents": False, "val_fraction": 0.3},
    },
    "mixture": {
        **TEXT,
        "init_args": {"corpus": {"text.txt": 2, "rows.jsonl": 1}, "tokenizer": "byte", "order": "permutation"},
    },
    "lines": {"class_path": "lm.data.LinesData", "init_args": {"corpus": "text.txt", "targets": "all", "end": "|"}},
    "arithmetic": {"class_path": "lm.data.ArithmeticData", "init_args": {"digits": 2, "held_out": 20}},
    "reverse": {"class_path": "lm.data.ReverseData", "init_args": {"held_out": 20}},
}
FIT = ("fit", "--config", "tiny.yaml")


def write_recipe(data: str = "permutation", **settings: Any) -> None:
    rows = [f'{{"text": "row {i} says {i * i}, and no more than that"}}\n' for i in range(60)]
    Path("rows.jsonl").write_text("".join(rows))
    size = 64 if data == "lines" else 16
    arguments = {**DATA[data]["init_args"], "block_size": size, "batch_size": 4}
    recipe = {**RECIPE, "data": {**DATA[data], "init_args": arguments}, "samples": {"max_new_tokens": 0}}
    recipe["trainer"] = {**RECIPE["trainer"], "val_check_interval": 100, **settings}
    recipe["model"] = {
        "class_path": "lm.training.LanguageModel",
        "init_args": {"net": {"class_path": "lm.models.Bigram"}},
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """All tokens that networks are trained on, in order; what steps_per_call passes over is not."""
    from lm.training import LanguageModel

    found: list[torch.Tensor] = []
    forward_of = LanguageModel.forward

    def forward(self: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
        if self.training:
            found.append(tokens)
        return forward_of(self, tokens)

    monkeypatch.setattr(LanguageModel, "forward", forward)
    return found


def order(data: str, count: int) -> torch.Tensor:
    """The first sequences of the order, as one process without a Trainer has them."""
    cli = Fit(["--config", "tiny.yaml", "--name", f"order-{data}"], "")
    module: Any = cli.datamodule
    assert isinstance(module, TokenData)
    module.prepare_data()
    module.setup("fit")
    return module.training_examples()(0, count)[0]


@pytest.mark.parametrize("data", often(DATA, 4))
def test_no_sequence_is_repeated_or_skipped(lm, workplace: Path, seen: list[torch.Tensor], data: str) -> None:
    write_recipe(data)
    for size, last in ((4, 5), (8, 9), (2, 12)):
        sizes = ("--data.init_args.batch_size", size, "--trainer.max_steps", last)
        code, _, err = lm(*FIT, "--ckpt_path", "auto", *sizes)
        assert code == 0, err
    consumed = 5 * 4 + 4 * 8 + 3 * 2
    assert torch.equal(torch.cat(seen), order(data, consumed))
    assert checkpoint.peek(Path("checkpoints/tiny/last.ckpt")).sequences == consumed
    rows = read_csv(Path("logs/tiny/metrics.csv"))[1]
    length = seen[0].shape[1]
    counts = [*range(4, 21, 4), *range(28, 53, 8), *range(54, 59, 2)]
    assert [int(row["train/tokens"]) for row in rows if row["train/tokens"]] == [n * length for n in counts]


@pytest.mark.parametrize(
    "extra",
    [
        ("--trainer.accumulate_grad_batches", 2),
        ("--data.init_args.num_workers", 1),
        ("--model.init_args.steps_per_call", 2, "--checkpoint.every_n_steps", 100),
        ("--model.init_args.steps_per_call", 4, "--checkpoint.every_n_steps", 100),
    ],
)
def test_however_a_step_is_taken(lm, workplace: Path, seen: list[torch.Tensor], extra: tuple) -> None:
    """Also where the run goes on inside a stack of steps: the first of it would be sequences before the first."""
    write_recipe("permutation")
    assert lm(*FIT, "--trainer.max_steps", 3)[0] == 0
    code, _, err = lm(*FIT, "--ckpt_path", "last", "--data.init_args.batch_size", 16, *extra)
    assert code == 0, err
    assert torch.equal(torch.cat(seen), order("permutation", 3 * 4 + 9 * 16))


def test_an_earlier_releases_checkpoint_had_its_own_recipes_batch(lm, workplace: Path, seen: list) -> None:
    write_recipe("permutation")
    assert lm(*FIT, "--trainer.max_steps", 5)[0] == 0
    path = Path("checkpoints/tiny/last.ckpt")
    saved = torch.load(path, weights_only=True)
    del saved["lm"]["sequences"], saved["lm"]["log"]
    torch.save(saved, path)
    assert lm(*FIT, "--ckpt_path", path, "--data.init_args.batch_size", 8)[0] == 0
    assert torch.equal(torch.cat(seen), order("permutation", 5 * 4 + 7 * 8))
    last = read_csv(Path("logs/tiny/metrics.csv"))[1][-1]
    assert int(last["train/tokens"]) == (5 * 4 + 7 * 8) * 16


def test_stopped_again_after_the_change_changes_no_bit(lm, workplace: Path) -> None:
    write_recipe("permutation")
    bigger = (*FIT, "--data.init_args.batch_size", 8)
    assert lm(*FIT, "--name", "start", "--trainer.max_steps", 4)[0] == 0
    start = ("--ckpt_path", "checkpoints/start/last.ckpt")
    assert lm(*bigger, "--name", "whole", *start)[0] == 0
    assert lm(*bigger, "--name", "parts", *start, "--trainer.max_steps", 7)[0] == 0
    assert lm(*bigger, "--name", "parts", "--ckpt_path", "last")[0] == 0
    whole, parts = (checkpoint.load(Path(f"checkpoints/{name}/last.ckpt")) for name in ("whole", "parts"))
    for saved in (whole, parts):
        assert saved["lm"]["sequences"] == 4 * 4 + 8 * 8
    assert_equal(whole["state_dict"], parts["state_dict"])
    assert_equal(whole["lm"]["log"], parts["lm"]["log"])


def test_the_result_counts_the_tokens_of_this_start(lm, workplace: Path) -> None:
    write_recipe("permutation")
    assert lm(*FIT, "--trainer.max_steps", 5)[0] == 0
    _, out, _ = lm(*FIT, "--ckpt_path", "last", "--data.init_args.batch_size", 8, "--json")
    assert yaml.safe_load(out.splitlines()[-1])["tokens"] == 7 * 8 * 16


def test_one_line_says_what_differs(lm, workplace: Path) -> None:
    assert lm(*FIT, "--trainer.max_steps", 5, "--model.init_args.net.init_args.bias", True)[0] == 0
    words = ["--data.init_args.batch_size", 8, "--seed_everything", 8, "--model.init_args.clip_norm", "null"]
    words += ["--data.init_args.order", "permutation", "--model.init_args.net.init_args.dropout", 0.0]
    words += ["--model.init_args.schedule.init_args.warmup_steps", 2]
    words += ["--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.init_args.lr", 0.01]
    harmless = ["--name", "other", "--trainer.log_every_n_steps", 7, "--trainer.precision", "32-true"]
    harmless += ["--checkpoint.every_n_steps", 3, "--data.init_args.num_workers", 0, "--samples.seed", 5]
    code, out, err = lm(*FIT, *words, *harmless, "--ckpt_path", "checkpoints/tiny/last.ckpt")
    assert code == 0, err
    notes = [line for line in out.splitlines() if "differs" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: the recipe differs from the checkpoint: ")
    assert sorted(notes[0].partition("checkpoint: ")[2].split(", ")) == sorted(
        [
            "seed_everything 7 → 8",
            "data.batch_size 4 → 8",
            "data.order random → permutation",
            "model.net.dropout 0.2 → 0.0",
            "model.optimizer.lr 0.001 → 0.01",
            "model.optimizer.weight_decay 0.1 → 0.01",
            "model.schedule.warmup_steps 3 → 2",
            "model.clip_norm 1.0 → null",
            "trainer.max_steps 5 → 12",
        ]
    )


def test_nothing_is_said_where_nothing_differs(lm, workplace: Path) -> None:
    assert lm(*FIT)[0] == 0
    spelled = [
        "--model.init_args.net",
        "lm.models.gpt.GPT",
        "--trainer.precision",
        32,
        "--trainer.log_every_n_steps",
        3,
    ]
    usual = ["--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.init_args.lr", 1e-3]
    usual += ["--model.init_args.optimizer.init_args.weight_decay", 0.1]
    net = {"n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.2, "n_kv_head": 2}
    for name, value in net.items():
        spelled += [f"--model.init_args.net.init_args.{name}", value]
    code, out, err = lm(*FIT, "--ckpt_path", "checkpoints/tiny/step=0000005.ckpt", "--name", "again", *spelled, *usual)
    assert code == 0, err
    assert "differs" not in out and "from step 5 to step 12" in out
