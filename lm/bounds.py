"""The range of every number in a recipe or on a command line: one table, for the command line and for constructors.

A bound is found by the setting's name; where classes use one name differently, by "Class.name". Numbers must be finite,
and true and false are not numbers.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

P = ParamSpec("P")
INT64 = 2**63 - 1


@dataclass(frozen=True)
class Bound:
    """The range of a number.

    Args:
        low: The least value.
        high: The largest.
        open_low: Whether low itself is out of bounds.
        open_high: Whether high itself is out of bounds.
        whole: Whether it must be a whole number.
        share: Whether a number with a decimal point is a share, at most 1.
        flag: Whether true and false are allowed, too.
        note: What an error's message adds.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    whole: bool = False
    share: bool = False
    flag: bool = False
    note: str = ""

    def allows(self, value: Any) -> bool:
        """Return whether a value is within; of a list or a mapping, whether all are. Anything but a number is."""
        if isinstance(value, Mapping | list | tuple):
            return all(map(self.allows, value.values() if isinstance(value, Mapping) else value))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return self.flag or not isinstance(value, bool)
        if isinstance(value, float) and (self.whole or not math.isfinite(value) or (self.share and value > 1)):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        """Return what follows "it must be"."""
        return self.wanted()

    def wanted(self, value: Any = None) -> str:
        """Return what follows "it must be", of a value that is not."""
        kind = "a whole number, " * self.whole or "a finite number"
        low = f"{'above' if self.open_low else 'at least'} {_shown(self.low)}"
        high = f"{'below' if self.open_high else 'at most'} {_shown(self.high)}"
        if not math.isfinite(self.low):
            return kind + self.note
        if self.share:
            return f"{low}: a whole number, or a share, at most 1.0{self.note}"
        above = isinstance(value, int | float) and value > self.high
        if self.high >= INT64 and not above:  # no limit that anyone would reach
            finite = " and finite" if isinstance(value, float) and not math.isfinite(value) else ""
            return f"{low}{finite}{self.note}"
        return f"{low} and {high}{self.note}"


def _shown(value: Any) -> str:
    """Return a value for a message: short, whatever it is."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    try:
        text = str(value)
    except ValueError:  # Python writes no numbers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:80] + "…"


ANY = Bound()
FREE = Bound(flag=True)
POSITIVE = Bound(0, open_low=True)
NOT_NEGATIVE = Bound(0)
SHARE = Bound(0, 1)
BELOW_ONE = Bound(0, 1, open_high=True)
PART = Bound(0, 1, open_low=True)
INSIDE = Bound(0, 1, open_low=True, open_high=True)
COUNT = Bound(1, INT64, whole=True)
COUNT_OR_NONE = Bound(0, INT64, whole=True)
SIZE = Bound(1, 2**31 - 1, whole=True)  # of a tensor: a product of a few is still a number that torch can refuse
FEW = Bound(1, 2**16, whole=True)
SEED = Bound(-(2**63), INT64, whole=True, note=": it has 64 bits")
LIMIT = Bound(0, INT64, share=True)

BOUNDS = {
    # networks
    **dict.fromkeys(("vocab_size", "block_size", "n_embd", "base_width", "n_hidden", "hidden_size"), SIZE),
    **dict.fromkeys(("n_layer", "n_head", "n_kv_head", "n_stack", "depth"), FEW),
    "fuse": Bound(2, 2**16, whole=True),
    "dropout": BELOW_ONE,
    "rope_theta": POSITIVE,
    "norm_eps": POSITIVE,
    "logit_soft_cap": POSITIVE,
    "init_std": POSITIVE,
    "head_scale": ANY,
    "MLP.momentum": PART,
    "WaveNet.momentum": PART,
    **dict.fromkeys(("document_end", "start_token", "pad_token"), Bound(0, 2**31 - 1, whole=True)),
    # training
    "clip_norm": Bound(0, note="; 0 or null never scales"),
    "spike": Bound(1, open_low=True, note="; null for none"),
    "steps_per_call": SIZE,
    **dict.fromkeys(("audit_every", "steps"), COUNT),
    "beta": POSITIVE,
    "group": SIZE,
    "clip": POSITIVE,
    **dict.fromkeys(("kl", "entropy", "value"), NOT_NEGATIVE),
    "gae": SHARE,
    "smoothing": Bound(0, 0.5, open_high=True, note=": a share of labels that are wrong"),
    "warmup_steps": COUNT_OR_NONE,
    "min_factor": SHARE,
    "factor": NOT_NEGATIVE,
    "milestones": COUNT_OR_NONE,
    "decay_fraction": PART,
    **dict.fromkeys(("lr", "muon_lr", "weight_decay", "eps"), NOT_NEGATIVE),
    **dict.fromkeys(("momentum", "betas"), BELOW_ONE),
    # data
    "batch_size": Bound(1, 2**20, whole=True),  # published ones are up to some thousands
    "corpus": POSITIVE,  # the weights of several
    "val_fraction": INSIDE,
    **dict.fromkeys(("Preparation.val_fraction", "prepare.val_fraction"), BELOW_ONE),
    "test_fraction": BELOW_ONE,
    "num_workers": Bound(0, 2**31 - 1, whole=True),
    "seed": SEED,
    "digits": Bound(1, 9, whole=True),
    "held_out": Bound(1, 2**31 - 1, whole=True),
    "train_problems": Bound(1, 2**31 - 1, whole=True),
    **dict.fromkeys(("shortest_length", "longest_length"), FEW),
    "shard_tokens": COUNT,
    "node": COUNT_OR_NONE,
    "workers": Bound(1, 1024, whole=True),
    "tokenizer.vocab_size": Bound(256, 2**20, whole=True, note=": the 256 single bytes are tokens, too"),
    "exercises.seconds": POSITIVE,
    # what a run keeps and shows
    **dict.fromkeys(("every_n_steps", "keep_last", "keep_every"), COUNT),
    "Figures.every_n_steps": COUNT_OR_NONE,
    "drift_every_n_steps": COUNT_OR_NONE,
    **dict.fromkeys(("timeout", "step_timeout", "meet_timeout"), Bound(0, 10**9, open_low=True, note=" seconds")),
    "SampleText.max_new_tokens": COUNT_OR_NONE,
    # text
    "max_new_tokens": COUNT,
    "num_samples": FEW,
    "temperature": NOT_NEGATIVE,
    "top_k": COUNT,
    "top_p": PART,
    "min_p": SHARE,
    "repetition_penalty": POSITIVE,
    # a server
    **dict.fromkeys(("slots", "max_requests", "max_choices"), FEW),
    "max_tokens": COUNT,
    "max_prompt_tokens": COUNT,
    "max_body_bytes": COUNT,
    "body_timeout": Bound(0, 10**9, open_low=True, note=" seconds"),
    "grace": Bound(0, 10**9, note=" seconds"),
    "port": Bound(0, 2**16 - 1, whole=True),
    # a cluster
    **dict.fromkeys(("num_nodes", "devices"), Bound(1, 2**20, whole=True)),
    "mfu": PART,
    # Lightning's
    "seed_everything": Bound(0, 2**32 - 1, whole=True),
    "Trainer.devices": Bound(-1, 2**20, whole=True, note=", which takes all there are"),
    "fast_dev_run": Bound(0, INT64, whole=True, flag=True),
    "max_epochs": Bound(-1, INT64, whole=True),
    "min_epochs": COUNT_OR_NONE,
    "max_steps": Bound(-1, INT64, whole=True),
    "min_steps": COUNT_OR_NONE,
    "max_time": NOT_NEGATIVE,
    **dict.fromkeys([f"limit_{kind}_batches" for kind in ("train", "val", "test", "predict")], LIMIT),
    "overfit_batches": LIMIT,
    "val_check_interval": Bound(0, INT64, open_low=True, share=True),
    "check_val_every_n_epoch": COUNT,
    "num_sanity_val_steps": Bound(-1, INT64, whole=True),
    "log_every_n_steps": COUNT_OR_NONE,
    "accumulate_grad_batches": SIZE,
    "gradient_clip_val": Bound(0, note="; 0 or null never scales"),
    "reload_dataloaders_every_n_epochs": COUNT_OR_NONE,
}

SECTIONS = {
    "trainer": "Trainer",
    "checkpoint": "Checkpoints",
    "samples": "SampleText",
    "figures": "Figures",
    "watch": "Watch",
}
"""Sections of a recipe that need no class_path, and their classes."""


def bound(owner: str, name: str) -> Bound | None:
    """Return the bound of a setting; None where it has none.

    Args:
        owner: Import path of the class, or name of the command, that has the setting. Other packages' classes check
            their own, except Lightning's Trainer and torch's optimizers.
        name: The setting's name.
    """
    path, _, kind = owner.rpartition(".")
    if path.split(".")[0] not in ("", "lm", "torch"):
        return None
    found = BOUNDS.get(f"{kind}.{name}")
    if path.startswith("torch.optim"):  # torch checks the rest itself, except infinity
        return BOUNDS[name] if name in ("lr", "betas", "weight_decay") else FREE
    return None if path.startswith("torch") else found or BOUNDS.get(name)


def complaints(values: Mapping[str, Any], owner: str = "", path: str = "") -> Iterator[str]:
    """Yield a line for each number that is out of bounds, in a whole recipe or in one class's arguments.

    Args:
        values: Settings, nested as recipes are.
        owner: Whose they are: a class's import path, or a command's name.
        path: What messages put in front of names, such as "data.".
    """
    if isinstance(values.get("class_path"), str):
        owner = values["class_path"]
        values = {**(values.get("init_args") or {}), **(values.get("dict_kwargs") or {})}
    for name, value in values.items():
        if (allowed := bound(owner, str(name))) is not None:
            if not allowed.allows(value):
                yield f"{path}{name} is {_shown(value)}: it must be {allowed.wanted(value)}"
        elif isinstance(value, Mapping):
            inner = SECTIONS.get(name, owner) if not path else owner
            yield from complaints(value, inner, f"{path}{name}.")
        elif isinstance(value, list):
            for each in value:
                if isinstance(each, Mapping):
                    yield from complaints(each, owner, f"{path}{name}.")


def check(values: Mapping[str, Any], owner: str, path: str, error: type[Exception]) -> None:
    """Raise an error for the first number that is out of bounds, see `complaints`."""
    for complaint in complaints(values, owner, path):
        raise error(complaint)


def checked(prefix: str = "", error: type[Exception] = ValueError) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Return a decorator that lets a constructor refuse numbers that are out of bounds.

    Args:
        prefix: What messages put in front of names, such as "data.".
        error: What is raised, with one line.
    """

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        signature = inspect.signature(init)
        owner = f"lm.{init.__qualname__.split('.')[0]}"

        @wraps(init)
        def check_and_init(*args: P.args, **kwargs: P.kwargs) -> None:
            given = signature.bind(*args, **kwargs).arguments
            own = {name: value for name, value in given.items() if bound(owner, name)}  # parts have checked theirs
            for name, value in own.items():
                if value is None and signature.parameters[name].annotation in (int, float):
                    raise error(f"{prefix}{name} has no value: say a number")
            check(own, owner, prefix, error)
            init(*args, **kwargs)

        return check_and_init

    return decorate
