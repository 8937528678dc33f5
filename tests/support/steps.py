"""Steps that go wrong."""

import math

SCHEDULE = ("--model.init_args.schedule", "lm.training.schedules.Constant")
CONSTANT = (*SCHEDULE, "--model.init_args.net.init_args.dropout", 0)


def poison(steps: list[int], factor: float, rank: int = 0) -> list[object]:
    number = ".nan" if math.isnan(factor) else factor
    arguments = f"{{steps: {steps}, factor: {number}, rank: {rank}}}"
    return ["--trainer.callbacks+", f"{{class_path: tests.support.stop.Poison, init_args: {arguments}}}"]
