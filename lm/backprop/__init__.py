"""The hand-derived gradient of everything in lm.models: one rule a layer, plain tensor code, no autograd."""

from lm.backprop import activations, attention, encoder, linear, norms, recurrent, shift  # noqa: F401  each registers its rules
from lm.backprop.networks import body, loss_and_gradients
from lm.backprop.rules import Gradients, NoRuleError, check, rule, run

__all__ = ["Gradients", "NoRuleError", "body", "check", "loss_and_gradients", "rule", "run"]
