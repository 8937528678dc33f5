"""Writing in the background, from copies in host memory, so that training waits only for the copy."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class BackgroundWriter:
    """One thread that runs jobs one after another, so that no two ever write the same file at once.

    Lightning's AsyncCheckpointIO is not used: it raises an error only when the run ends, and nothing can be done after
    a file is complete, such as copying it or removing an older one.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._failed = False
        self._copies: dict[int, Tensor] = {}

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job after those before it; skip it after one that has failed, whose file it may be about to copy."""

        def do() -> None:
            if self._failed:
                return
            try:
                job()
            except BaseException:
                self._failed = True
                raise

        self._pool = self._pool or ThreadPoolExecutor(1, "checkpoints", initializer=_step_back)
        self._pending.append(self._pool.submit(do))

    def check(self) -> None:
        """Raise the error of a job that has failed, if there is one."""
        while self._pending and (self._pending[0].done() or self._failed):
            self._finish_first()

    def wait(self) -> None:
        """Wait for all jobs; raise the error of the first that has failed."""
        while self._pending:
            self._finish_first()

    def _finish_first(self) -> None:
        try:
            self._pending.pop(0).result()
        except BaseException:
            for job in self._pending:  # none of them has begun, or it does nothing
                job.cancel()
            if self._failed:
                self._pending.clear()
                self._failed = False
            raise

    def finish(self) -> None:
        """Wait until all writing has ended, even where an exception, such as a signal's, has cut `wait` short."""
        if self._pool is not None:
            self._pool.shutdown()

    def snapshot(self, values: Any) -> Any:
        """Return a copy of nested values with the tensors in host memory; tensors that share storage still do.

        The copies' memory is kept for the next snapshot: fresh pages would cost as much as the copying. So call it only
        once the last snapshot has been written.
        """
        seen: dict[Any, Tensor] = {}

        def copied(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: copied(one) for key, one in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(copied(one) for one in value)
            if not isinstance(value, Tensor):
                return value
            key = (value.device, value.data_ptr(), value.shape, value.stride()) if value.numel() else id(value)
            if key not in seen:
                seen[key] = self._copy(len(seen), value.detach())
            return seen[key]

        result = copied(values)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies from its memory are asynchronous
        return result

    def _copy(self, number: int, value: Tensor) -> Tensor:
        copy = self._copies.get(number)
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
            copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._copies[number] = copy
        return copy.copy_(value, non_blocking=True)


def _step_back() -> None:
    """Leave the calling thread about a seventh of a core: on a CPU, training needs all cores.

    With less, a write that takes seconds would take minutes, and the next save would wait for it.
    """
    if hasattr(os, "setpriority"):  # Linux has a priority per thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 8)
