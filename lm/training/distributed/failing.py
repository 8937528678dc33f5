"""Whether all ranks have failed at the same step."""

import time
from contextlib import suppress

from lightning.pytorch import Trainer
from torch.distributed.distributed_c10d import _get_default_store

PATIENCE = 5.0  # seconds that a failed rank waits for the others to fail too


def all_have_failed(trainer: Trainer) -> bool:
    """Return whether all ranks have failed at this step, as all call the same callbacks; waits some seconds for them.

    Ranks that did not fail would not join a collective operation, so failures are counted in the rendezvous store.
    """
    if trainer.world_size == 1:
        return True
    key = f"lm/failed/{trainer.global_step}"
    with suppress(Exception):  # rank 0, which holds the store, is gone
        store = _get_default_store()
        failed = store.add(key, 1)
        end = time.monotonic() + PATIENCE
        while failed < trainer.world_size and time.monotonic() < end:
            time.sleep(0.05)
            failed = store.add(key, 0)
        return failed == trainer.world_size or store.add(key, -1) + 1 == trainer.world_size  # any later is too late
    return False
