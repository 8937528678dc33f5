"""A course of exercises: gradients to derive by hand, and a checker that says in which way an answer is wrong."""

from lm.course.block import ATTENTION, BLOCK
from lm.course.layers import CONVOLUTION, EMBEDDING, LAYER_NORM, RANKING, RMS_NORM, ROTARY
from lm.course.lecture import LECTURE
from lm.course.small_steps import SMALL_STEPS

EXERCISES = {
    one.name: one
    for one in (
        SMALL_STEPS, *LECTURE, LAYER_NORM, ATTENTION, EMBEDDING, RMS_NORM, ROTARY, CONVOLUTION, BLOCK, RANKING,
    )
}  # fmt: skip
"""In the order in which they are meant to be solved."""
