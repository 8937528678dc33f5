"""`lm classify`: the class of a text, and how likely it is."""

from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from lm.checkpoints.restore import load_network
from lm.cli import common, devices, plain_help, values
from lm.errors import UserError


def make_parser() -> ArgumentParser:
    """Return the parser of `lm classify`."""
    about = 'Say the class of a text by a network that was trained on such, lm classify --ckpt_path PATH "not bad".'
    parser = plain_help.make_parser("classify", about)
    parser.add_argument("texts", type=str, nargs="+", metavar="TEXT", help="One or several.")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="The checkpoint.")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, mps, or auto: the fastest there is.")
    parser.add_argument("--json", action="store_true", help="Print all classes as JSON; the text goes to stderr.")
    return parser


@torch.inference_mode()
def classify(arguments: list[str]) -> None:
    """Run `lm classify`."""
    options = values.parse(make_parser(), arguments)
    from lm.data.classes import PAD, classes, encoded  # imports Lightning, which takes a second

    device = devices.device(options.device)
    net, tokenizer, *_ = load_network(options.ckpt_path, device, writes=False)
    longest = int(net.block_size)  # type: ignore[arg-type]
    for text in options.texts:
        if not 1 <= len(text) <= longest:
            raise UserError(f"{text[:40]!r} has {len(text)} characters: it takes 1 to {longest}")
        if PAD in text:
            raise UserError(f"{text[:40]!r} has the control character 3, which pads texts here: take it out")
    names = classes(tokenizer)
    tokens = encoded(tokenizer, options.texts, longest).to(device)
    out, found = common.output(options.json), []
    for text, one in zip(options.texts, tokens, strict=True):
        logits = net(one.unsqueeze(0))[0, list(names.values())]  # (1, T) -> (V,) -> (K,)
        likely = dict(zip(names, logits.double().softmax(0).tolist(), strict=True))
        best = max(likely, key=lambda name: likely[name])
        print(f"{best} {likely[best]:.4f}", file=out, flush=True)
        found.append({"text": text, "class": best, "probability": likely[best], "probabilities": likely})
    if options.json:
        common.print_json({"texts": found})
