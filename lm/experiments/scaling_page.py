"""What a report says of runs that differ in size: a power law of their losses, and what the next size would have."""

import numpy as np

from lm.experiments import drawings, power_law
from lm.experiments.runs import Run


def sections(runs: list[Run]) -> list[str]:
    """Return a figure for parameters or tokens, where four runs differ in one, by a factor of two in all.

    In the other they must agree, or there must be runs enough for a law of both.
    """
    figures = [(run.name, run.figures()) for run in runs]
    known = [(name, one) for name, one in figures if {"parameters", "tokens", "validation loss"} <= one.keys()]
    sizes = {kind: {one[kind] for _, one in known} for kind in ("parameters", "tokens")}
    differ = {kind: len(one) > 2 and max(one) >= 2 * min(one) for kind, one in sizes.items()}
    found = []
    for kind, other in (("parameters", "tokens"), ("tokens", "parameters")):
        if differ[kind] and len(sizes[kind]) > 3 and len(sizes[other]) == 1:
            found.append(_figure(kind, [(name, one[kind], one["validation loss"]) for name, one in known]))
    if all(differ.values()):
        found += _both([(one["parameters"], one["tokens"], one["validation loss"]) for _, one in known])
    return [f"<h2>Loss by size</h2>{''.join(found)}"] if found else []


def _figure(kind: str, points: list[tuple[str, int, float]]) -> str:
    sizes, losses = [[size] for _, size, _ in points], [loss for *_, loss in points]
    law, following = power_law.fit(sizes, losses), 2 * max(sizes)[0]
    low, high = power_law.interval(sizes, losses, [following])
    line = [(float(x), law.at([x])) for x in np.geomspace(min(sizes)[0], following, 60)]
    title = (
        f"Validation loss by {kind}: {law.floor:.3f} + {law.factors[0]:.3g} × ({kind} / {law.scales[0]:.3g})^"
        f"-{law.exponents[0]:.3f}; {following:,} {kind} would have {law.at([following]):.4f} ({low:.4f} to {high:.4f})"
    )
    return drawings.scatter(title, [(size, loss, name) for name, size, loss in points], log_x=True, line=line)


def _both(points: list[tuple[int, int, float]]) -> list[str]:
    sizes, losses = [[float(n), float(d)] for n, d, _ in points], [loss for *_, loss in points]
    try:
        law = power_law.fit(sizes, losses)
    except ValueError:  # too few
        return []
    following = [2 * max(column) for column in zip(*sizes, strict=True)]
    low, high = power_law.interval(sizes, losses, following)
    n, d = (f"{f:.3g} × ({k} / {s:.3g})^-{e:.3f}" for f, e, s, k in zip(
        law.factors, law.exponents, law.scales, ("parameters", "tokens"), strict=True
    ))  # fmt: skip
    text = f"Validation loss: {law.floor:.3f} + {n} + {d}. Twice the largest of both would have {law.at(following):.4f}"
    said = [
        (law.at(size), loss, f"{size[0]:,.0f} parameters, {size[1]:,.0f} tokens")
        for size, loss in zip(sizes, losses, strict=True)
    ]
    ends = [min(losses), max(losses)]
    drawn = drawings.scatter("Measured loss by fitted loss", said, line=[(end, end) for end in ends])
    return [f"<p>{text} ({low:.4f} to {high:.4f}).</p>", drawn]
