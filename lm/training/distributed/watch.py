"""Ends a run, in time and naming the rank, when ranks die, hang, lose their network or drift apart."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from lm import log
from lm.bounds import checked
from lm.errors import CheckError, Stopped, UserError, setting, take_stops
from lm.training import lightning_internals
from lm.training.distributed.drift import check_drift
from lm.training.distributed.meeting import Launcher, Meeting, end, end_starter, lost_child
from lm.training.lightning_internals import SubprocessLauncher


class Watch(Callback):
    """Ends the run when a rank is lost, within a time of your choice rather than after NCCL's half hour.

    Each rank regularly writes a heartbeat and its progress to the store of the rendezvous. Rank 0 watches all others,
    and they watch it.

    Args:
        timeout: Seconds without a heartbeat after which a rank counts as lost: dead, stopped, or without a network.
        step_timeout: Seconds without any finished batch, in training or evaluation, after which the run counts as hung.
            Compilation and data preparation must fit in.
        meet_timeout: Seconds within which all processes must have started and found each other.
        drift_every_n_steps: Steps between comparisons of all weights' checksums over the ranks; 0 for none.
    """

    @checked("watch.", UserError)
    def __init__(
        self,
        *,
        timeout: float = 60,
        step_timeout: float = 1800,
        meet_timeout: float = 600,
        drift_every_n_steps: int = 1000,
    ) -> None:
        self.timeout, self.step_timeout, self.meet_timeout = timeout, step_timeout, meet_timeout
        self.drift_every_n_steps = drift_every_n_steps
        self.progress = 0
        """How much this rank has begun and finished: batches, and the parts of a step between which ranks wait."""
        self.children: list[Any] = []
        """The ranks that this one has started."""
        self._lives: Lives | None = None
        self._meeting: Meeting | None = None

    def attach(self, trainer: Trainer) -> None:
        """Set a launcher that leaves this machine's ranks to this watch; keep Lightning from handling signals."""
        lightning_internals.take_no_signals(trainer)
        if isinstance(trainer.strategy.launcher, SubprocessLauncher):
            environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
            launcher = Launcher(environment, trainer.num_devices, trainer.num_nodes, self.meet_timeout)
            lightning_internals.launch_by(trainer, launcher)
            self._meeting, self.children = launcher.meeting, launcher.children

    def over(self, trainer: Trainer, work: Callable[[], object]) -> None:
        """Run a Trainer, and end the processes that it has started.

        Raises:
            CheckError: Another rank was lost.
        """
        try:
            work()
        except RuntimeError as error:
            if trainer.world_size == 1 or not is_lost_contact(error):
                raise
            raise self.name_the_lost(error) from error
        finally:
            if isinstance(trainer.strategy.launcher, Launcher):
                trainer.strategy.launcher.end(patience=min(10, self.timeout / 2))  # before they take this one for lost

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start watching, once all ranks have arrived."""
        if self._meeting is not None:
            self._meeting.over()
        if trainer.world_size == 1 or self._lives is not None:
            return
        if isinstance(trainer.strategy.launcher, Launcher):
            trainer.strategy.launcher.met.set()
        self._lives = Lives(trainer.global_rank, trainer.world_size, self)
        self._lives.say()
        trainer.strategy.barrier("watch")
        self._lives.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count a batch that has come from the loader."""
        self.progress += 1

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Count a forward pass."""
        self.progress += 1

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count a backward pass."""
        self.progress += 1

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a batch that has come from the loader."""
        self.progress += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the weights, where that is due."""
        every = self.drift_every_n_steps
        due = every and trainer.world_size > 1 and trainer.global_step % every == 0
        if due and lightning_internals.step_finished(trainer, batch_idx):
            module: Any = pl_module
            check_drift(module.net, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching where this rank ends by itself; where it lost another one, `name_the_lost` takes over."""
        if not is_lost_contact(exception):
            self.stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching."""
        self.stop()

    def stop(self) -> None:
        """Stop watching."""
        if self._lives is not None:
            self._lives.ended.set()

    def name_the_lost(self, error: BaseException) -> CheckError:
        """Wait until it is known which rank was lost, and end; return an error where all seem to be alive."""
        take_stops(lambda signum, frame: os._exit(Stopped(signum).exit_code))
        if self._lives is not None:
            time.sleep(self.timeout + 3 * self._lives.interval)  # meanwhile the watching threads end the process
        if lost := lost_child(self.children):  # it was lost before those threads started
            ended = CheckError(lost[0])
            ended.exit_code = lost[1]
            return ended
        return CheckError(
            f"contact with another rank was lost: {str(error).splitlines()[0]}: {setting('ckpt_path')} auto goes on"
        )


class Lives:
    """Tracks which other ranks are alive.

    Times are from the monotonic clock, so that a jump of the wall clock ends no run. Two threads: one talks to the
    store, which may block for ever when the network is cut; the other checks the times.

    Args:
        rank: This one.
        world_size: Number of ranks.
        watch: The settings.
    """

    def __init__(self, rank: int, world_size: int, watch: Watch) -> None:
        self.rank, self.world_size, self.watch = rank, world_size, watch
        self.interval = min(1.0, watch.timeout / 5)
        self.others = list(range(1, world_size)) if rank == 0 else [0]
        self.heard: dict[int, tuple[str, float]] = {}  # each rank's newest heartbeat, and when it arrived
        self.counts: dict[int, tuple[int, float]] = {}  # the same for its progress
        store: Any = _get_default_store()
        self.store = store.clone()  # a connection of its own: another thread's wait must not hold it up
        self.beats = 0
        self.shown = False
        self.ended = threading.Event()

    def say(self) -> None:
        """Write this rank's heartbeat: its progress, host and process."""
        self.beats += 1
        sign = f"{self.beats} {self.watch.progress} {socket.gethostname()} {os.getpid()}"
        self.store.set(f"lm/lives/{self.rank}", sign)

    def start(self) -> None:
        """Begin."""
        now = time.monotonic()
        self.heard = dict.fromkeys(self.others, ("", now))
        self.counts = dict.fromkeys(range(self.world_size), (0, now))
        for target in (self._talk, self._look):
            threading.Thread(target=target, daemon=True, name="watch").start()

    def _talk(self) -> None:
        self.store.set_timeout(timedelta(seconds=self.watch.timeout))
        try:
            while not self.ended.wait(self.interval):
                self.say()
                signs = self.store.multi_get([f"lm/lives/{rank}" for rank in self.others])
                now = time.monotonic()
                for rank, sign in zip(self.others, (sign.decode() for sign in signs), strict=True):
                    if sign != self.heard[rank][0]:
                        self.heard[rank] = sign, now
                        self._count(rank, int(sign.split()[1]), now)
                self._count(self.rank, self.watch.progress, now)
        except Exception:  # the store is gone, and with it rank 0: the other thread notices
            return

    def _count(self, rank: int, progress: int, now: float) -> None:
        if progress != self.counts[rank][0]:
            self.counts[rank] = progress, now

    def _look(self) -> None:
        before = time.monotonic()
        while not self.ended.wait(self.interval):
            now = time.monotonic()
            if now - before > 3 * self.interval + 1:  # this process was itself suspended; nobody is late yet
                self.heard = {rank: (sign, now) for rank, (sign, _) in self.heard.items()}
                self.counts = {rank: (count, now) for rank, (count, _) in self.counts.items()}
            before = now
            self._see_children()
            self._see_the_others(now)
            self._see_progress(now)

    def _see_children(self) -> None:
        lost = lost_child(self.watch.children)
        if lost and not self.ended.wait(self.interval):
            self._end(*lost)

    def _see_the_others(self, now: float) -> None:
        lost = {rank: sign for rank, (sign, when) in self.heard.items() if now - when > self.watch.timeout}
        for rank, sign in lost.items():
            _, _, host, pid = sign.split() if sign else ("", "", "unknown host", "0")
            if rank == 0:
                end_starter()
            self._end(
                f"rank {rank} of {self.world_size} ({host}, process {pid}) gave no sign of life for "
                f"{self.watch.timeout:g} s: it died, was stopped, or lost its network"
            )

    def _see_progress(self, now: float) -> None:
        """End the run where all ranks hang; each first prints where it hangs."""
        limit = self.watch.step_timeout
        if not self.shown and now - self.counts[self.rank][1] > limit:
            self.shown = True
            os.write(2, f"{log.line(f'rank {self.rank} hangs here:', level='warning')}\n".encode())
            faulthandler.dump_traceback(sys.stderr)
        if self.rank == 0 and all(now - when > limit + 3 * self.interval for _, when in self.counts.values()):
            fewest = min(count for count, _ in self.counts.values())
            behind = [str(rank) for rank, (count, _) in self.counts.items() if count == fewest]
            who = "all alike" if len(behind) == self.world_size else f"rank {', '.join(behind)} behind the others"
            self._end(f"no rank has come any further for {limit:g} s, {who}: see where they hang, above")

    def _end(self, what: str, code: int = 1) -> None:
        if self.ended.is_set():
            return
        line = (
            f"rank {self.rank} ends: {what}; the newest checkpoint is whole: continue with {setting('ckpt_path')} auto"
        )
        end(line, self.watch.children, code)


LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL", "Broken pipe", "gloo")


def is_lost_contact(error: BaseException) -> bool:
    """Return whether an error is that of a collective operation that lost another rank."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)
