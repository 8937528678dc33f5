"""The schema of a checkpoint: the only file that knows its keys; all others ask `Saved`."""

from dataclasses import dataclass, field, fields
from importlib import metadata
from typing import Any, Self

from torch import Tensor

NET = "net."
"""The prefix of a network's weights in a checkpoint."""
OURS, START, RANDOM_STATES = "lm", "start", "random_states"
"""The keys that lm adds to Lightning's: what `Saved.entry` returns, the run's start, every rank's generators."""
NUMBER = (int, float)

Outline = Any
"""A type; a dict of required keys and their outlines; or a list of one outline, which all items must match."""


FITTED: Outline = {
    "global_step": int,
    "state_dict": dict,
    OURS: {"tokenizer": {"kind": str}, "vocab_size": int, "block_size": int},
}
"""What a LanguageModel saves, even in a user's own Trainer."""
USED: Outline = FITTED | {
    OURS: FITTED[OURS] | {"config": {"model": {"init_args": {"net": {"class_path": str}}}}},
}
"""What every command needs."""
RESUMED: Outline = USED | {
    "epoch": int,
    "loops": {"fit_loop": dict},
    "callbacks": {"Checkpoints": {"best": NUMBER, "validated_step": int}},
    RANDOM_STATES: [{"torch": Tensor, "cuda": list, "python": tuple, "numpy": tuple}],
    OURS: USED[OURS] | {"train": dict, "validation": dict},
}
"""What training needs to resume."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint holds, checked; of what an earlier release did not save, its default.

    Build one by `Saved.of`; only what is to be written is built field by field.
    """

    step: int
    """Optimizer steps done."""
    start: int = 0
    """Which start of its run wrote it, counted from 1: a later start is newer, even at an earlier step."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """The LightningModule's state; empty where only the metadata of a sharded checkpoint was read."""
    optimizers: list[dict[str, Any]] | None = None
    """The optimizers' states; an empty list in an imported one, None where they are stored elsewhere."""
    config: dict[str, Any] | None = None
    """The recipe; None from a user's own Trainer."""
    tokenizer: dict[str, Any]
    """The tokenizer's state: `lm.tokenizers.from_state` makes it again."""
    vocab_size: int
    block_size: int
    versions: dict[str, str] = field(default_factory=dict)
    """Of what the result depends on."""
    train: dict[str, float] = field(default_factory=dict)
    """The newest training metrics, "step" among them."""
    validation: dict[str, float] = field(default_factory=dict)
    """The newest evaluation's."""
    guard: dict[str, Any] = field(default_factory=dict)
    """The state of the guard against steps that would harm."""
    log: dict[str, Any] | None = None
    """The state of the `StepLog`."""
    sequences: int | None = None
    """How many sequences the run has consumed; None where its data does not count them."""
    writes: bool = True
    """Whether its network writes text; else it scores texts, or says their class."""

    @property
    def scores(self) -> bool:
        """Whether it is of a reward model, whose head has one output in place of the vocabulary's."""
        return len(self.weights.get("lm_head.weight", ())) == 1 < self.vocab_size

    @classmethod
    def of(cls, checkpoint: Any, outline: Outline = USED, *, without_tensors: bool = False) -> Self:
        """Return what a checkpoint holds, as Lightning saves and loads it.

        Args:
            checkpoint: The dict.
            outline: What it must have.
            without_tensors: It is the metadata of a sharded one.

        Raises:
            ValueError: Something is missing, or of another type; the message names it.
        """
        required = {key: inner for key, inner in outline.items() if key != "state_dict" or not without_tensors}
        if wrong := _problem(checkpoint, required):
            raise ValueError(wrong)
        ours = checkpoint[OURS]
        if outline is RESUMED and (
            wrong := _not_a_number(checkpoint["loops"], "loops")
            or _not_a_number({key: ours.get(key) for key in ("train", "validation", "guard")}, OURS)
        ):
            raise ValueError(wrong)
        return cls(
            step=checkpoint["global_step"],
            start=int(checkpoint.get(START, 0)),
            state=checkpoint.get("state_dict", {}),
            optimizers=checkpoint.get("optimizer_states"),
            **{name: ours[name] for name in _OURS if name in ours},
        )

    def entry(self) -> dict[str, Any]:
        """Return what lm adds to Lightning's checkpoint under `OURS`: plain values, without code."""
        return {name: getattr(self, name) for name in _OURS}

    def imported(self) -> dict[str, Any]:
        """Return a whole checkpoint without optimizer states: for inference and fine-tuning, not for resuming."""
        return {
            "pytorch-lightning_version": metadata.version("lightning"),  # without it Lightning takes it for an old one
            "global_step": self.step,
            "epoch": 0,
            "state_dict": self.state,
            "optimizer_states": [],
            OURS: self.entry(),
            START: self.start,
        }

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights and buffers of the network, under their names in it."""
        return {key.removeprefix(NET): value for key, value in self.state.items() if key.startswith(NET)}

    @property
    def net(self) -> dict[str, Any]:
        """The network's class_path and init_args."""
        return net_of(self.config or {})

    @property
    def data(self) -> dict[str, Any]:
        """The class_path and init_args of what it was trained on; empty where that is not known."""
        return (self.config or {}).get("data") or {}

    def consumed(self, batch_size: int) -> int:
        """Return how many sequences the run has consumed.

        An earlier release did not count them: its steps then all count with its recipe's batch size.

        Args:
            batch_size: Used where the checkpoint has neither a count nor a recipe.
        """
        if self.sequences is not None:
            return self.sequences
        size: int = (self.data.get("init_args") or {}).get("batch_size", batch_size)
        return self.step * size

    def logged(self) -> dict[str, Any]:
        """Return the `StepLog`'s state; an earlier release's tokens follow from its last logged step."""
        tokens = self.step * self.train["tokens"] // self.train["step"] if self.train.get("step") else 0
        return self.log or {"tokens": tokens, "loss_total": 0.0, "loss_steps": 0}


_OURS = {one.name for one in fields(Saved)} - {"step", "start", "state", "optimizers"}


def net_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the class_path and init_args of a recipe's network."""
    net: dict[str, Any] = recipe["model"]["init_args"]["net"]
    return net


def optimizer_of(recipe: dict[str, Any]) -> str:
    """Return the class_path of a recipe's optimizer."""
    chosen = recipe["model"]["init_args"].get("optimizer")
    return chosen["class_path"] if chosen else "torch.optim.AdamW"


def not_finite(weights: dict[str, Tensor]) -> str | None:
    """Return the name of the first of a network's weights that has NaN or infinity."""
    return next((name for name, value in weights.items() if not value.isfinite().all()), None)


def _problem(found: Any, outline: Outline, where: str = "") -> str | None:
    """Return the first key that is missing or of another type, or None where all is there.

    Args:
        found: A checkpoint, or a part of it.
        outline: What it must have.
        where: Which part it is.
    """
    if isinstance(outline, dict):
        if not isinstance(found, dict):
            return f"{where or 'it'} is of type {type(found).__name__}"
        for key, inner in outline.items():
            path = f"{where}.{key}".lstrip(".")
            if key not in found:
                return f"it has no {path}"
            if wrong := _problem(found[key], inner, path):
                return wrong
        return None
    if isinstance(outline, list):
        if not isinstance(found, list):
            return f"{where} is of type {type(found).__name__}"
        return next(filter(None, (_problem(item, outline[0], where) for item in found)), None)
    return None if isinstance(found, outline) else f"{where} is of type {type(found).__name__}"


def _not_a_number(found: Any, where: str) -> str | None:
    """Return what is wrong with the first value in nested dicts that is neither a number nor None."""
    if isinstance(found, dict):
        return next(filter(None, (_not_a_number(value, f"{where}.{key}") for key, value in found.items())), None)
    return None if found is None or isinstance(found, NUMBER) else f"{where} is of type {type(found).__name__}"
