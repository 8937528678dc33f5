"""In which way a gradient is wrong: what is wrong is compared with the answers of the usual mistakes."""

import inspect
import math
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from lm.backprop.atomic import called
from lm.course.exercise import Blank, Exercise, Terms, Values

CLOSE = 1e-8


def close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors of a shape are equal but for rounding."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return found.shape == expected.shape and bool((found - expected).abs().max() <= CLOSE * max(scale, 1e-300))


def diagnose(exercise: Exercise, blank: Blank, values: Values, found: Tensor, expected: Tensor) -> str:
    """Return what is wrong: the kind of fault, a colon, and what it is."""
    if not found.isfinite().all():
        return "not finite: there is inf or NaN in it"
    if found.shape != expected.shape:
        return _shape(found, expected)
    if found.ndim > 1 and found.shape[-1] == found.shape[-2] and close(found.mT, expected):
        return "transposed: the right numbers, with rows and columns exchanged"
    for text, wrong in blank.faults.items():
        if close(called(wrong, values).expand_as(expected), found):
            return text
    checks: list[Callable[[], str | None]] = [lambda: _constant(found, expected, values)]
    if blank.terms is not None:
        terms = called(blank.terms, values)
        checks.append(lambda: _of_terms(found, terms, values))
    if blank.expected is None:
        parts = exercise.parts(blank.of, values)
        checks.insert(0, lambda: _parts(found, expected, parts, values))
        checks += [
            lambda: _places(exercise, blank, values, found, expected),
            lambda: _operand(exercise, blank, values, found, expected),
            lambda: _product(exercise, blank, values, found),
            lambda: _terms(exercise, blank, values, found, expected),
            lambda: _factors(exercise, blank, values, found, expected),
            lambda: _slope(exercise, blank, values, found, expected),
        ]
    return next((said for check in checks if (said := check())), _elsewhere(found, expected))


def _shape(found: Tensor, expected: Tensor) -> str:
    has, must = tuple(found.shape), tuple(expected.shape)
    if found.ndim >= 2 and found.mT.shape == expected.shape:
        return f"transposed: it is {has}, and must be {must}"
    if found.numel() == expected.numel():
        same = "the right numbers, but " if close(found.reshape(must), expected) else ""
        keep = ": keepdim=True keeps a summed axis" if len(has) < len(must) else ""
        return f"shape: {same}it is {has}, and must be {must}{keep}"
    try:
        summed = found.sum_to_size(must)
    except RuntimeError:
        pass
    else:
        right = ", and would then be right" if close(summed, expected) else ""
        return f"missing sum: it is {has}, and must be {must}: what was broadcast must be summed{right}"
    for axes in ((0,), (1,), (0, 1), (0, 2)):
        if max(axes) < found.ndim and found.sum(axes).shape == expected.shape:
            return f"missing sum: it is {has}, and must be {must}: sum over axis {', '.join(map(str, axes))}"
    try:
        found.expand(must)
    except RuntimeError:
        return f"shape: it is {has}, and must be {must}, the shape of the tensor itself"
    return f"shape: it is {has}, and must be {must}: it would be broadcast, and pass for right: expand it"


def _bessel(factor: float, values: Values) -> bool:
    sizes = {size for one in values.values() if isinstance(one, Tensor) for size in one.shape if size > 2}
    return any(math.isclose(factor, (n - 1) / n) or math.isclose(factor, n / (n - 1)) for n in sizes)


def _named(factor: float, values: Values) -> str:
    """Return what to say of a constant factor."""
    if _bessel(factor, values):
        return "Bessel: the sum is divided by n where it must be n - 1, or the other way round"
    if math.isclose(factor, -1):
        return "factor: the sign is wrong, it is -1 times what it must be"
    inverse = 1 / factor
    note = ""
    if math.isclose(inverse, round(inverse)) and abs(inverse) > 1:
        note = f", 1/{round(inverse)}: a mean where there must be a sum?" if inverse > 2 else ", a half"
    return f"factor: it is {factor:.6g} times what it must be{note}"


def _constant(found: Tensor, expected: Tensor, values: Values) -> str | None:
    if not found.any():
        return "missing: it is zero everywhere; with a gradient from above that is not zero, it must not be"
    factor = float((found * expected).sum() / (expected * expected).sum())
    return _named(factor, values) if factor and close(found / factor, expected) else None


def _weights(found: Tensor, terms: list[Tensor]) -> list[float] | None:
    """Return the factors by which a tensor is a sum of some terms; None where it is none."""
    table = torch.stack([term.expand_as(found).flatten() for term in terms], dim=1)  # (N, K)
    weights = torch.linalg.lstsq(table, found.reshape(-1, 1)).solution  # (K, 1)
    if not close((table @ weights).view_as(found), found):
        return None
    return [round(weight, 9) for weight in weights.flatten().tolist()]


def _parts(found: Tensor, expected: Tensor, parts: dict[str, Tensor], values: Values) -> str | None:
    """Compare with weighted sums of what each reader of the tensor adds."""
    weights = _weights(found, list(parts.values())) if len(parts) > 1 else None
    if weights is None or len(set(weights)) == 1:  # a factor of the whole is said otherwise
        return None
    factors = dict(zip(parts, weights, strict=True))
    lost = [name for name, factor in factors.items() if factor == 0]
    if lost:
        return f"overwritten: the part that comes by {' and '.join(lost)} is not there: gradients of all uses are added"
    name, factor = next((name, factor) for name, factor in factors.items() if factor != 1)
    return f"{_named(factor, values)}, in the part that comes by {name}"


def _of_terms(found: Tensor, terms: Terms, values: Values) -> str | None:
    """Compare with weighted sums of a formula's terms, or of what they are with mistakes in them."""
    for mistakes in product(*[("", *wrong) for _, wrong in terms.values()]):
        chosen = [wrong.get(one, term) for one, (term, wrong) in zip(mistakes, terms.values(), strict=True)]
        weights = _weights(found, chosen)
        if weights is None:
            continue
        if made := [f"{one}, in the term {name}" for one, name in zip(mistakes, terms, strict=True) if one]:
            return made[0]
        factors = dict(zip(terms, weights, strict=True))
        if lost := [name for name, factor in factors.items() if factor == 0]:
            return f"missing sum: a term is not there: {' and '.join(lost)}"
        wrong = [(name, factor) for name, factor in factors.items() if factor != 1]
        if wrong and len(terms) > 1:
            return f"{_named(wrong[0][1], values)}, in the term {wrong[0][0]}"
    return None


def _places(exercise: Exercise, blank: Blank, values: Values, found: Tensor, expected: Tensor) -> str | None:
    """Compare with what single places of the results alone would give, where a sum runs over places."""
    for reader in exercise.readers(blank.of):
        dy, others = values[f"d{reader}"], expected - exercise.part(blank.of, reader, values[f"d{reader}"], values)
        pieces = [exercise.part(blank.of, reader, one, values) for one in _alone(dy)]
        if any(close(others + piece, found) for piece in pieces):
            return "missing sum: it has one term of a sum alone: add all"
        if found.ndim < 2 and not any(one.dtype == torch.int64 for one in values.values() if isinstance(one, Tensor)):
            continue
        left = found - others
        if (left.flatten(1) if left.ndim > 1 else left[:, None]).shape[0] != expected.shape[0]:
            continue
        if _each_row_is_one_of(left, [expected - others, *pieces]):
            return "overwritten: where a row is used several times, only one of its gradients is there: add them up"
    return None


def _alone(dy: Tensor) -> Iterator[Tensor]:
    """Yield a gradient with all but one index of its first axes set to zero."""
    if dy.ndim == 0:
        return
    sizes = [dy.shape[:1], dy.shape[:2]] if dy.ndim > 1 else [dy.shape[:1]]
    if dy.ndim > 1:
        for i in range(dy.shape[1]):
            only = torch.zeros_like(dy)
            only[:, i] = dy[:, i]
            yield only
    for size in sizes:
        if math.prod(size) <= 200:
            for at in product(*map(range, size)):
                only = torch.zeros_like(dy)
                only[at] = dy[at]
                yield only


def _each_row_is_one_of(found: Tensor, candidates: list[Tensor]) -> bool:
    scale = float(candidates[0].abs().max())
    table = torch.stack(candidates)  # (K, N, …)
    difference = (table - found).abs().flatten(2).amax(2) if found.ndim > 1 else (table - found).abs()  # (K, N)
    return bool((difference.amin(0) <= CLOSE * scale).all())


def _operand(exercise: Exercise, blank: Blank, values: Values, found: Tensor, expected: Tensor) -> str | None:
    """Compare with what comes out where another factor of a step is transposed, left out, or taken for another."""
    for reader in exercise.readers(blank.of):
        others = expected - exercise.part(blank.of, reader, values[f"d{reader}"], values)

        def gives(name: str, value: Tensor, reader: str = reader, others: Tensor = others) -> bool:
            changed = {**values, name: value}
            return close(others + exercise.part(blank.of, reader, changed[f"d{reader}"], changed), found)

        for name in (f"d{reader}", *inspect.signature(exercise.steps[reader]).parameters):
            value = values[name]
            if name == blank.of or not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if value.ndim > 1 and value.shape[-1] == value.shape[-2] and gives(name, value.mT):
                return f"transposed: {name} must be transposed in the product, or must not be"
            if gives(name, torch.ones_like(value)):
                return f"factor: {name} is missing"
            for other, stand_in in values.items():
                same = isinstance(stand_in, Tensor) and stand_in.shape == value.shape and other != name
                if same and stand_in.is_floating_point() and gives(name, stand_in):
                    return f"factor: {other} stands where {name} must"
    return None


def _product(exercise: Exercise, blank: Blank, values: Values, found: Tensor) -> str | None:
    """Compare with products of the two matrices that the right one is made of, in any order, transposed or not."""
    for reader in exercise.readers(blank.of):
        for name in inspect.signature(exercise.steps[reader]).parameters:
            if name == blank.of or not isinstance(values[name], Tensor) or values[name].ndim < 2:
                continue
            pair = {f"d{reader}": values[f"d{reader}"], name: values[name]}
            forms = {f"{one}{turned * '.T'}": x.mT if turned else x for one, x in pair.items() for turned in (0, 1)}
            for (a, x), (b, y) in product(forms.items(), repeat=2):
                if a[:2] != b[:2] and x.ndim == y.ndim and x.shape[-1] == y.shape[-2] and close(x @ y, found):
                    return f"transposed: it is {a} @ {b}: the order, or what is transposed, must be another"
    return None


def _terms(exercise: Exercise, blank: Blank, values: Values, found: Tensor, expected: Tensor) -> str | None:
    """See whether each element has one term alone of a sum over an axis of another factor, such as a kernel's taps."""
    for reader in exercise.readers(blank.of):
        for name in inspect.signature(exercise.steps[reader]).parameters:
            value = values[name]
            if name == blank.of or not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            for axis in [axis for axis, size in enumerate(value.shape) if size <= 8]:
                some = [
                    torch.zeros_like(value).index_copy(axis, at, value.index_select(axis, at))
                    for at in _each(value, axis)
                ]
                terms = [exercise.part(blank.of, reader, values[f"d{reader}"], {**values, name: one}) for one in some]
                if not close(torch.stack(terms).sum(0), expected):
                    continue
                difference = (torch.stack([expected, *terms]) - found).abs().amin(0)
                if difference.max() <= CLOSE * expected.abs().max():
                    return (
                        f"overwritten: there is one term alone where several must be added, along axis {axis} of {name}"
                    )
    return None


def _each(value: Tensor, axis: int) -> list[Tensor]:
    return list(torch.arange(value.shape[axis]).split(1))


def _factors(exercise: Exercise, blank: Blank, values: Values, found: Tensor, expected: Tensor) -> str | None:
    """Look for a forward value, or a power of it, that multiplies the one and not the other, in a reader's part."""
    readers = exercise.readers(blank.of)
    for reader in readers:
        part = exercise.part(blank.of, reader, values[f"d{reader}"], values)
        if said := _factor(found - (expected - part), part, values):
            return said + f", in the part that comes by {reader}" * (len(readers) > 1)
    return None


def _factor(found: Tensor, expected: Tensor, values: Values) -> str | None:
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or name.startswith("d"):
            continue
        for power in (1, 2, 3, -1, -2, 0.5, -0.5):
            factor = value**power
            try:
                if (found * factor).shape != expected.shape or not factor.isfinite().all():
                    continue
            except RuntimeError:
                continue
            spelled = name if power == 1 else f"{name}^{power:g}"
            for one, other, what in ((found, expected, "missing"), (expected, found, "too many")):
                scale = (one * factor * other).sum() / (one * factor).square().sum()
                if close(one * factor * scale, other):
                    more = "" if math.isclose(scale, 1) else ", and a constant is wrong, too"
                    return f"factor: {spelled} is {what}{more}"
    return None


def _slope(exercise: Exercise, blank: Blank, values: Values, found: Tensor, expected: Tensor) -> str | None:
    """Say that a function of each element alone has another slope; or that a factor differs from row to row."""
    ratio = (found / expected).nan_to_num()
    for axis in range(ratio.ndim):
        if ratio.shape[axis] > 1 and (ratio.amax(axis) - ratio.amin(axis)).abs().max() <= 1e-6 * ratio.abs().max():
            return f"factor: it is wrong by a factor that is the same along axis {axis}"
    readers = exercise.readers(blank.of)
    x = values[blank.of]
    for reader in readers if len(readers) == 1 else []:
        if values[reader].shape != x.shape or x.ndim == 0:
            continue
        alone = True
        for at in ((0,) * x.ndim, (-1,) * x.ndim):
            only = torch.zeros_like(values[f"d{reader}"])
            only[at] = 1.0
            reached = exercise.part(blank.of, reader, only, values)
            reached[at] = 0.0
            alone = alone and not reached.any()
        if alone:
            return f"factor: the slope of {reader}, a function of each element alone, is another"
    return None


def _elsewhere(found: Tensor, expected: Tensor) -> str:
    largest = expected.abs().max()
    if (found - expected).abs().max() < 1e-3 * largest:
        share = float((found - expected).abs().max() / largest)
        return f"other: nearly right, but for {share:.0e} of the largest number: is an ε missing, or another?"
    wrong = (found - expected).abs() > CLOSE * largest
    at = tuple(wrong.nonzero()[0].tolist())
    return (
        f"other: {int(wrong.sum())} of {wrong.numel()} numbers differ, first at {list(at)}: "
        f"{float(found[at]):.6g} must be {float(expected[at]):.6g}"
    )
