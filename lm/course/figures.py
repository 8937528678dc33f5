"""Pictures of a network and its first batch: what the lectures draw on the board.

Shapes: B batch, T time, C channels, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm.backprop import Gradients, NoRuleError, atomic, loss_and_gradients
from lm.backprop.compare import undisturbed
from lm.course import diagrams
from lm.models import WaveNet
from lm.training.callbacks import pictures
from lm.training.callbacks.figures import SATURATED
from lm.training.callbacks.pictures import Pixels
from lm.training.optimizers import parameter_groups

MOST = 32  # rows of a picture, tokens of a sentence
MOST_SYMBOLS = 300  # of a vocabulary whose symbols are drawn
FEW = 8  # tokens where single numbers are to be seen
HEALTHY = -3.0  # log10 of an update's size over its parameter's


def draw(
    net: Any,
    tokens: Tensor,
    targets: Tensor,
    symbols: Sequence[str],
    make_optimizer: Callable[..., Any] | None = None,
) -> dict[str, Pixels]:
    """Return the pictures that a network has something for, by name.

    Args:
        net: A network in training mode. With an optimizer, it takes a step at the end.
        tokens: int64 (B, T).
        targets: int64 (B, T) or (B,).
        symbols: A text for each of the V tokens.
        make_optimizer: Returns the recipe's optimizer of parameter groups, whose first step is shown; None for none.
    """
    found: dict[str, Pixels] = {}
    with undisturbed(net), torch.no_grad():
        found |= _passes(net, tokens, targets)
        found |= _stuck(net, tokens)
    named = [symbols[i] for i in tokens[0, :MOST].tolist()]
    if hasattr(net, "attention_maps"):
        maps = net.attention_maps(tokens[:1, :MOST])
        found |= {f"attention-block-{i}": pictures.attention(one[0], named) for i, one in enumerate(maps)}
        found["averages"] = averages(maps[0][0, 0, :FEW, :FEW], named[:FEW])
    if isinstance(net, WaveNet):
        leaves = [symbols[i] for i in tokens[-1, -net.context :].tolist()]
        found["fusion-tree"] = diagrams.fusion_tree(leaves, round(net.context ** (1 / len(net.h))))
    found |= _embedding(net, symbols)
    with undisturbed(net):
        found |= _dlogits(net, tokens, targets, symbols)
    return found | (_updates(net, make_optimizer) if make_optimizer else {})


def _passes(net: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Pixels]:
    try:
        values = atomic.forward(net, tokens, targets)
    except ValueError:  # only for the lecture's MLP
        return {}
    order = ["C", "W1", "b1", "bngain", "bnbias", "W2", "b2", *atomic.FORWARD]
    steps = {name: step.__code__.co_varnames[: step.__code__.co_argcount] for name, step in atomic.FORWARD.items()}
    shapes = {name: list(values[name].shape) for name in order if isinstance(values.get(name), Tensor)}
    readers = {name: [one for one, reads in steps.items() if name in reads] for name in shapes}
    return {"forward-and-backward": diagrams.passes(shapes, readers)}


def _stuck(net: nn.Module, tokens: Tensor) -> dict[str, Pixels]:
    """Return, for each tanh and ReLU, which units pass no gradient at which examples."""
    found: dict[str, Pixels] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            units = output.flatten(0, -2)[: 2 * MOST]  # (N, C)
            stuck = units.abs() > SATURATED if isinstance(module, nn.Tanh) else units <= 0
            title = f"{name}: {'saturated' if isinstance(module, nn.Tanh) else 'off'}, units across, examples down"
            found[f"activations-{name}"] = pictures.stuck_units(stuck, title)

        return hook

    handles = [
        module.register_forward_hook(look(name))
        for name, module in net.named_modules()
        if isinstance(module, nn.Tanh | nn.ReLU)
    ]
    net(tokens)
    for handle in handles:
        handle.remove()
    return found


def averages(head: Tensor, names: Sequence[str]) -> Pixels:
    """Return the weights (T, T) by which each position collects its past, in four versions."""
    T = len(head)  # noqa: N806
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    looped = torch.zeros(T, T)
    for t in range(T):
        looped[t, : t + 1] = 1 / (t + 1)
    triangle = torch.ones(T, T).tril()
    versions = {
        "1: a loop of means": looped,
        "2: a triangle, rows divided": triangle / triangle.sum(1, keepdim=True),
        "3: softmax of masked zeros": torch.zeros(T, T).masked_fill(future, -torch.inf).softmax(1),
        "4: a head of attention": head.cpu(),
    }
    return diagrams.together([pictures.matrix(one, names, names, title, 1.0) for title, one in versions.items()])


def _embedding(net: nn.Module, symbols: Sequence[str]) -> dict[str, Pixels]:
    """Return the embedding's rows in the plane of their two largest principal components."""
    tables = [m.weight for m in net.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == len(symbols)]
    if not tables or min(tables[0].shape) < 2 or len(symbols) > MOST_SYMBOLS:
        return {}
    rows = tables[0].detach().float().cpu()  # (V, C)
    centred = rows - rows.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    return {"embedding": diagrams.points(centred @ axes[:2].T, symbols, "the embedding, in two dimensions")}


def _dlogits(net: nn.Module, tokens: Tensor, targets: Tensor, symbols: Sequence[str]) -> dict[str, Pixels]:
    """Return the gradient by the logits; every parameter gets its own."""
    grads = Gradients()
    grads.keep_dlogits = True
    net.zero_grad()
    try:
        with torch.no_grad():
            loss_and_gradients(net, grads, tokens, targets)
    except NoRuleError:
        return {}
    if grads.dlogits is None or len(symbols) > MOST_SYMBOLS:
        return {}
    return {"dlogits": pictures.dlogits(grads.dlogits[:MOST], symbols)}


def _updates(net: nn.Module, make_optimizer: Callable[..., Any]) -> dict[str, Pixels]:
    """Return the sizes of a step's updates beside the parameters'."""
    before = {name: p.detach().clone() for name, p in net.named_parameters() if p.ndim > 1}
    make_optimizer(parameter_groups(net)).step()
    ratios = {}
    for name, old in before.items():
        update, size = (net.get_parameter(name).detach() - old).std(), old.std()
        if update > 0 and size > 0:
            ratios[name] = float((update / size).log10())
    title = "log10 of a first update at the full learning rate over the parameter; about -3, in red, is healthy"
    return {"updates": diagrams.bars(ratios, title, best=HEALTHY)} if ratios else {}
