"""Whether all ranks have failed at one step."""

import time
from contextlib import suppress

from lightning.pytorch import Trainer
from torch.distributed.distributed_c10d import _get_default_store

PATIENCE = 5.0  # seconds of a rank that has failed for the others to fail, too


def all_have_failed(trainer: Trainer) -> bool:
    """Return whether all ranks have failed at this step, as all call the same callbacks; waits some seconds for them.

    Ranks that go on know nothing of it, so no collective operation can tell: the store does where they have met.
    """
    if trainer.world_size == 1:
        return True
    key = f"lm/failed/{trainer.global_step}"
    with suppress(Exception):  # the first rank, who has the store, is gone
        store = _get_default_store()
        failed = store.add(key, 1)
        end = time.monotonic() + PATIENCE
        while failed < trainer.world_size and time.monotonic() < end:
            time.sleep(0.05)
            failed = store.add(key, 0)
        return failed == trainer.world_size or store.add(key, -1) + 1 == trainer.world_size  # who comes now is too late
    return False
