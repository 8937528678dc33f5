"""Texts and contents that several tests read."""

import base64
import random
import re

import torch
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

BYTES = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))


def random_text(seed: int, size: int = 300) -> str:
    draw = random.Random(seed)
    points = (
        draw.choice((draw.randrange(128), draw.randrange(0x250), draw.randrange(0x1F600, 0x1F650))) for _ in range(size)
    )
    return "".join(map(chr, points))


CONTENTS = {
    "global_step": 5,
    "start": 1,
    "lm": {
        "config": {"model": {"init_args": {"net": {"class_path": "lm.models.Bigram"}}}},
        "tokenizer": {"kind": "char", "symbols": "ab"},
        "vocab_size": 2,
        "block_size": 4,
    },
    "state_dict": {"weight": torch.arange(3000.0)},
}


def pinned(name: str) -> dict[str, str]:
    rows = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / name).read_text(), flags=re.MULTILINE)
    return {canonicalize_name(package): version for package, version in rows}
