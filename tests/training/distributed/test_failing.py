"""An error of a user's callback on several ranks: the last step is saved where all ranks have it."""

from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from lm.checkpoints import checkpoint
from tests.conftest import start


class Fails(Callback):
    """Fails after the third step.

    Args:
        ranks: On which ranks.
    """

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step == 3 and trainer.global_rank in self.ranks:
            raise RuntimeError("of its own")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[0, 1], [1]], ids=str)
def test_what_fails_on_all_ranks_is_saved_first(workplace: Path, ranks: list[int]) -> None:
    callback = f'[{{"class_path": "{__name__}.Fails", "init_args": {{"ranks": {ranks}}}}}]'
    words = ["fit", "--config", "tiny.yaml", "--trainer.devices", 2, "--checkpoint.every_n_steps", 2]
    words += ["--trainer.callbacks", callback, "--trainer.val_check_interval", 100]
    process = start(*words, cwd=workplace)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "of its own" in err, err
    last = checkpoint.verify(workplace / "checkpoints/tiny/last.ckpt")
    assert checkpoint.peek(last).step == (3 if len(ranks) == 2 else 2)
