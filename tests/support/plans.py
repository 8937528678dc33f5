"""Networks whose memory is predicted by `lm.planning.needs` and measured in a process of their own."""

from torch.optim import AdamW

from lm.models import GPT
from lm.planning import needs


def recipe_of(vocab: int, size: dict, batch: int, precision: str = "32-true") -> needs.Recipe:
    shape = (batch, 256)
    return needs.Recipe(
        lambda: GPT(vocab, 256, **size), lambda groups: AdamW(groups, fused=True), shape, shape, precision
    )


BIG = {"n_layer": 4, "n_head": 6, "n_embd": 384, "bias": False}
LLAMA = {"n_layer": 3, "n_head": 4, "n_embd": 384, "n_kv_head": 2, "norm": "rms", "positions": "rotary"}
LLAMA |= {"feed_forward": "swiglu", "tie_weights": False}
CASES = {
    "gpt": ((5000, BIG, 4), False),
    "recomputed": ((5000, BIG, 4), True),
    "llama": ((8000, LLAMA, 4), False),
}
