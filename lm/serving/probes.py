"""What the page shows of a network besides its text: a text's tokens, and a head's attention over them."""

from typing import Any

import torch

from lm.models import GPT
from lm.models.attention import SeparateHeads
from lm.serving.errors import ApiError
from lm.serving.service import Service
from lm.serving.values import Values

LONGEST = 256
"""Tokens of a text whose attention is shown: its size grows with their square."""


async def tokenize(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """Return what a tokenizer makes of a text, as vLLM's /tokenize does."""
    values = Values(body)
    worker = service.worker(values.text("model") or "")
    text = values.text("prompt") or ""
    with_names = values.flag("return_token_strs")
    values.end()
    ids = service.ids(worker, text) if text else []
    found: dict[str, Any] = {"count": len(ids), "max_model_len": worker.context, "tokens": ids}
    return found | ({"token_strs": [service.names[worker.name](i) for i in ids]} if with_names else {})


async def attention(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """Return how much each token of a text attends to each: rows that sum to 1, of one head of one layer."""
    values = Values(body)
    worker = service.worker(values.text("model") or "")
    text, layer = values.text("prompt") or "", values.whole("layer", 0, 1 << 16) or 0
    head = values.whole("head", 0, 1 << 16) or 0
    values.end()
    net = worker.net
    if not isinstance(net, GPT):
        raise ApiError(f"model {worker.name!r} has no attention to show", "model")
    ids = service.ids(worker, text)[-min(LONGEST, net.block_size) :]
    attn = net.h[0].attn
    heads = len(attn.heads) if isinstance(attn, SeparateHeads) else int(attn.n_head)  # type: ignore[arg-type, union-attr]
    for name, value, number in (("layer", layer, len(net.h)), ("head", head, heads)):
        if value >= number:
            raise ApiError(f"{name} is {value}: the network has {number}, from 0", name)

    @torch.inference_mode()
    def weights() -> list[list[float]]:
        maps = net.attention_maps(torch.tensor([ids], device=worker.engine.device))[layer][0, head]  # (T, T)
        return [[round(x, 4) for x in row] for row in maps.float().tolist()]

    names = service.names[worker.name]
    rows = await worker.compute(weights)
    return {"tokens": [names(i) for i in ids], "weights": rows, "layers": len(net.h), "heads": heads}
