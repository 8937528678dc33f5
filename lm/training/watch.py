"""A watchful run: ranks that die, hang, lose their network or drift apart end it, in time and by name."""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous

from lm import log
from lm.bounds import checked
from lm.errors import CheckError, UserError
from lm.training import progress
from lm.training.drift import check_drift

STARTER = "LM_STARTED_BY"
"""Of the environment: the process that started this rank."""


class Launcher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine, and leaves watching them to `Watch`.

    Lightning's own observer kills this process, without a word and within five seconds, when another rank ends: also
    when that one has stopped as it should, while this one still writes the checkpoint.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.children: list[Any] = []
        self.met = threading.Event()

    def _call_children_scripts(self) -> None:
        os.environ[STARTER] = str(os.getpid())
        if place := log.shared_memory():
            os.environ["LM_SAID"] = place  # what is wrong for all ranks is said once
        super()._call_children_scripts()
        self.children += self.procs
        self.procs = []  # the observer sees none
        threading.Thread(target=self._see_them_meet, daemon=True, name="meeting").start()

    def _see_them_meet(self) -> None:
        while not self.met.wait(0.5):
            lost = lost_child(self.children)
            if lost and not self.met.wait(5):  # what ended it may end this process too, with a line of its own
                end(f"{lost[0]} before the processes had met", self.children, lost[1])

    def end(self, patience: float) -> None:
        """Wait for the other ranks, and kill those that do not end."""
        self.met.set()
        deadline = time.monotonic() + patience
        for child in self.children:
            try:
                child.wait(max(0, deadline - time.monotonic()))
            except Exception:  # it does not end
                child.kill()


class Watch(Callback):
    """Ends the run where a rank is lost, within a time of your choice rather than after NCCL's half hour.

    Each rank says once in a while that it lives, and how far it is, by way of the store where the ranks have met. Rank
    0 watches all others, and they watch it.

    Args:
        timeout: Seconds without a sign of life after which a rank counts as lost: dead, stopped, or without a network.
        step_timeout: Seconds without any finished batch, in training or evaluation, after which the run counts as hung.
            Compilation and the preparation of data must fit in.
        meet_timeout: Seconds in which all processes must have started and found each other.
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
        """What this rank has begun and finished, counted: batches, and the parts of a step between which ranks wait."""
        self.children: list[Any] = []
        """The ranks that this one has started; set by the launcher's owner."""
        self._lives: Lives | None = None
        self._waiting: threading.Timer | None = None

    def meet(self, trainer: Trainer) -> None:
        """See, before torch waits for half an hour, that the place where the processes meet can be reached.

        Raises:
            UserError: It cannot; the first process, which the others did not reach, ends with the same exit code.
            CheckError: The process that started this one, and which it was to meet, has died.
        """
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.world_size == 1 or environment is None:
            return
        place = f"{environment.main_address}:{environment.main_port}"
        if trainer.is_global_zero:
            self._wait(f"the other processes did not come to {place} in {self.meet_timeout:g} s: start them too")
            return
        deadline, reason = time.monotonic() + self.meet_timeout, ""
        while time.monotonic() < deadline:
            try:
                socket.create_connection((environment.main_address, environment.main_port), timeout=5).close()
                self._wait(f"rank {trainer.global_rank}: rank 0 did not answer at {place} in {self.meet_timeout:g} s")
                return
            except OSError as error:
                reason = error.strerror or str(error)
                if os.environ.get(STARTER, str(os.getppid())) != str(os.getppid()):
                    raise CheckError(f"rank {trainer.global_rank}: rank 0, which started it, is gone") from error
                time.sleep(min(1, self.meet_timeout / 10))
        raise UserError(
            f"rank {trainer.global_rank}: {place}, where the processes meet, was not reached in "
            f"{self.meet_timeout:g} s ({reason}): see MASTER_ADDR, MASTER_PORT, and whether the first process runs"
        )

    def _wait(self, what: str) -> None:
        def give_up() -> None:
            end_starter()
            end(what, self.children, 2)

        self._waiting = threading.Timer(self.meet_timeout, give_up)
        self._waiting.daemon = True
        self._waiting.start()

    def meet_again(self, trainer: Trainer) -> None:
        """Let processes that torchrun has started anew meet in a part of its store of their own.

        Its static rendezvous keeps one store for all its restarts (torch 2.13), where they would find the addresses of
        the processes that have died.
        """
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if trainer.world_size == 1 or attempt == "0":
            return
        strategy: Any = trainer.strategy
        rank, world_size = trainer.global_rank, trainer.world_size
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=self.meet_timeout)))
        distributed.init_process_group(
            strategy._get_process_group_backend(),
            store=distributed.PrefixStore(f"attempt {attempt}", store),
            rank=rank,
            world_size=world_size,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to watch, once the ranks have met."""
        if self._waiting is not None:
            self._waiting.cancel()
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
        if due and progress.step_finished(trainer, batch_idx):
            module: Any = pl_module
            check_drift(module.net, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Watch no longer where this rank ends by itself; where it lost another one, `name_the_lost` goes on."""
        if not is_lost_contact(exception):
            self.stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch no longer."""
        self.stop()

    def stop(self) -> None:
        """Watch no longer."""
        if self._lives is not None:
            self._lives.ended.set()

    def name_the_lost(self, error: BaseException) -> CheckError:
        """Wait until it is known which rank was lost, and end; return an error where all seem to live."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda number, frame: os._exit(128 + number))
        if self._lives is not None:
            time.sleep(self.timeout + 3 * self._lives.interval)  # meanwhile the watching threads end the process
        if lost := lost_child(self.children):  # before they could begin to watch
            ended = CheckError(lost[0])
            ended.exit_code = lost[1]
            return ended
        return CheckError(f"contact with another rank was lost: {str(error).splitlines()[0]}: --ckpt_path auto goes on")


class Lives:
    """What this rank knows of the others' lives.

    Times are of a clock that cannot be set, so that a jump of the wall clock ends no run.
    Two threads: one talks to the store, which may block for ever where a network is cut, the other looks at the time.

    Args:
        rank: This one.
        world_size: Number of ranks.
        watch: The settings.
    """

    def __init__(self, rank: int, world_size: int, watch: Watch) -> None:
        self.rank, self.world_size, self.watch = rank, world_size, watch
        self.interval = min(1.0, watch.timeout / 5)
        self.others = list(range(1, world_size)) if rank == 0 else [0]
        self.heard: dict[int, tuple[str, float]] = {}  # the newest sign of life of a rank, and when it was new
        self.counts: dict[int, tuple[int, float]] = {}  # the same of its progress
        store: Any = _get_default_store()
        self.store = store.clone()  # a connection of its own: another thread's wait must not hold it up
        self.beats = 0
        self.shown = False
        self.ended = threading.Event()

    def say(self) -> None:
        """Say that this rank lives, where it is and how far."""
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
            if now - before > 3 * self.interval + 1:  # this process was itself stopped; nobody is late yet
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
        """End where all hang; each shows first where it does."""
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
        line = f"rank {self.rank} ends: {what}; the newest checkpoint is whole: continue with --ckpt_path auto"
        end(line, self.watch.children, code)


def lost_child(children: list[Any]) -> tuple[str, int] | None:
    """Return which of the ranks that this one started has failed and how, and an exit code; None where none has."""
    for rank, child in enumerate(children, start=1):
        if code := child.poll():
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return f"rank {rank} (process {child.pid}) {how}", max(1, code)
    return None


def end_starter() -> None:
    """Kill rank 0 where it has started this one: stopped, it would hold its device for ever."""
    if os.environ.get(STARTER) == str(os.getppid()):
        os.kill(os.getppid(), signal.SIGKILL)


def end(what: str, children: list[Any], code: int) -> None:
    """End this process, and those it has started, with a line that says why."""
    os.write(2, f"{log.line(what, level='error')}\n".encode())
    for child in children:
        child.kill()
    os._exit(code)  # the main thread may wait for the lost rank in C++, where no exception reaches it


LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL", "Broken pipe", "gloo")


def is_lost_contact(error: BaseException) -> bool:
    """Return whether an error is a collective's that lost another rank."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)
