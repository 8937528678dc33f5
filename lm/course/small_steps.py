"""The small steps that every derivation is made of."""
# ruff: noqa: N803  the names of matrices

import torch
from torch import Tensor

from lm.course.exercise import Blank, Exercise, Values


def _inputs(generator: torch.Generator) -> Values:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values: Values = {"a": random(3, 3), "b": random(3, 1), "x": random(3, 4), "z": random(4), "s": random(5)}
    return values | {"A": random(2, 2), "B": random(2, 2), "c": random(2), "index": torch.tensor([2, 0, 2, 1, 2])}


def _product(A: Tensor, B: Tensor, c: Tensor) -> Tensor:
    """D = A @ B + c, element by element."""
    d11 = A[0, 0] * B[0, 0] + A[0, 1] * B[1, 0] + c[0]
    d12 = A[0, 0] * B[0, 1] + A[0, 1] * B[1, 1] + c[1]
    d21 = A[1, 0] * B[0, 0] + A[1, 1] * B[1, 0] + c[0]
    d22 = A[1, 0] * B[0, 1] + A[1, 1] * B[1, 1] + c[1]
    return torch.stack([d11, d12, d21, d22]).view(2, 2)


def da(dscaled: Tensor, b: Tensor) -> Tensor:
    """scaled_ij = a_ij b_i, so a_ij gets b_i dscaled_ij: the same broadcast as on the way forth."""
    return dscaled * b


def db(dscaled: Tensor, a: Tensor) -> Tensor:
    """b_i is replicated over the columns j, so it is used three times: Σ_j a_ij dscaled_ij, of shape (3, 1)."""
    return (dscaled * a).sum(1, keepdim=True)


def dx(dtotal: Tensor, x: Tensor) -> Tensor:
    """Addition hands its gradient to each of its terms: the sum's gradient is replicated over the columns."""
    return dtotal.expand_as(x)


def dz(dsquare: Tensor, dshifted: Tensor, z: Tensor) -> Tensor:
    """z is read by two steps, so its gradient is the sum of two: 2 z dsquare, and dshifted as it is."""
    return 2 * z * dsquare + dshifted


def ds(dpicked: Tensor, s: Tensor, index: Tensor) -> Tensor:
    """s[2] is picked three times, so it gets the sum of three gradients; s[3] is never picked, and gets zero."""
    return torch.zeros_like(s).index_add(0, index, dpicked)


def dA(dD: Tensor, B: Tensor) -> Tensor:  # noqa: N802
    """a11 is in d11 and d12: da11 = dd11 b11 + dd12 b12. Collected for all four: dA = dD Bᵀ."""
    return dD @ B.mT


def dB(dD: Tensor, A: Tensor) -> Tensor:  # noqa: N802
    """b11 is in d11 and d21: db11 = a11 dd11 + a21 dd21. Collected for all four: dB = Aᵀ dD."""
    return A.mT @ dD


def dc(dD: Tensor) -> Tensor:
    """c1 is in d11 and d21: the sum of each column of dD."""
    return dD.sum(0)


SMALL_STEPS = Exercise(
    name="small-steps",
    title="Small steps",
    story="""Every derivation is made of these. Two rules say nearly all of it:

- what the forward pass **broadcasts**, the backward pass **sums**, and the other way round;
- what is used **twice** gets two gradients, which **add up**.

A gradient has the shape of its tensor, always. Write out an element on paper where you are not sure.""",
    inputs=_inputs,
    steps={
        "scaled": lambda a, b: a * b,  # (3, 3) * (3, 1) -> (3, 3)
        "total": lambda x: x.sum(1, keepdim=True),  # (3, 4) -> (3, 1)
        "square": lambda z: z**2,
        "shifted": lambda z: z + 1,
        "picked": lambda s, index: s[index],
        "D": _product,
    },
    blanks=(
        Blank(solution=da, hints=("What does one element of scaled depend on?", "scaled[i, j] = a[i, j] * b[i]")),
        Blank(solution=db, hints=("b is (3, 1): how often is each of its elements used?", "sum(1, keepdim=True)")),
        Blank(solution=dx, hints=("Each element of x is a term of one sum.", "The gradient must be (3, 4): expand")),
        Blank(solution=dz, hints=("Two steps read z.", "d(z²) = 2 z dz; the other step adds a constant")),
        Blank(solution=ds, hints=("index has 2 three times.", "Begin with zeros; index_add adds where = overwrites")),
        Blank(solution=dA, hints=("Look for a11 in d11 … d22.", "A product of dD and B, one of them transposed")),
        Blank(solution=dB, hints=("Look for b11 in d11 … d22.", "A product of A and dD, one of them transposed")),
        Blank(solution=dc, hints=("c1 is in d11 and d21.", "A sum over the rows")),
    ),
)
