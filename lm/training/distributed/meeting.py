"""The rendezvous of a job's processes: it names those that are missing, and a signal can end the wait."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from lm import log
from lm.errors import CheckError, UserError
from lm.training import lightning_internals
from lm.training.lightning_internals import SubprocessLauncher

STARTER = "LM_STARTED_BY"
"""Environment variable: the id of the process that started this rank."""


class Launcher(SubprocessLauncher):
    """Starts the other ranks of this machine, waits for all ranks, and leaves watching them to `Watch`.

    Lightning's own observer silently kills this process within five seconds after another rank ends, even if that one
    stopped as it should while this one is still writing the checkpoint.
    """

    def __init__(self, environment: Any, num_processes: int, num_nodes: int, timeout: float) -> None:
        super().__init__(environment, num_processes, num_nodes)
        self.children: list[Any] = []
        self.met = threading.Event()
        self.meeting = Meeting(timeout, self.children)

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other ranks, wait for all, and call the function."""

        def work(*args: Any, **kwargs: Any) -> Any:
            if not distributed.is_initialized():
                self.meeting.begin(trainer)
                meet_again(trainer, self.meeting.timeout)
            return function(*args, **kwargs)

        return super().launch(work, *args, trainer=trainer, **kwargs)

    def _call_children_scripts(self) -> None:
        os.environ[STARTER] = str(os.getpid())
        if place := log.shared_memory():
            os.environ["LM_SAID"] = place  # an error that all ranks have is printed once
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


class Meeting:
    """One process's wait for all the others.

    torch waits for the others in C++, where Python handles no signals. So all wait here first, in Python, and find each
    other by keys in a store at the process and port that torch's own store will use too.

    Args:
        timeout: Seconds within which all must arrive.
        children: The ranks that this one has started.
    """

    def __init__(self, timeout: float, children: list[Any]) -> None:
        self.timeout, self.children = timeout, children
        self._timer: threading.Timer | None = None
        self._store: Any = None

    def begin(self, trainer: Trainer) -> None:
        """Wait until all processes are there; say whom this one waits for.

        Raises:
            UserError: The rendezvous address cannot be reached; rank 0, which the others did not reach, ends with the
                same exit code.
            CheckError: Rank 0 has died.
        """
        environment: Any = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.world_size == 1 or environment is None:
            return
        rank, host, port = trainer.global_rank, environment.main_address, environment.main_port
        self.place, self.says = f"{host}:{port}", trainer.local_rank == 0 and trainer.num_nodes > 1
        if rank:
            self._reach(rank, host, port)
            self._give_up_later(f"rank {rank}: rank 0 did not answer at {self.place} in {self.timeout:g} s")
        else:
            what = f"the other processes did not come to {self.place} in {self.timeout:g} s: start them too"
            self._give_up_later(what)
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        with ThreadPoolExecutor(1) as pool:
            store = pool.submit(
                distributed.TCPStore, host, port, trainer.world_size, serves,
                timedelta(seconds=self.timeout), wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
            while not store.done():  # Python handles signals here
                time.sleep(0.05)
        try:
            self._store = store.result()
            own = isinstance(environment, LightningEnvironment)
            self._wait(rank, trainer.world_size, start_by_hand=own)
        except RuntimeError as error:
            if rank == 0:
                raise UserError(f"{self.place}, where the processes meet: {str(error).splitlines()[0]}") from error
            raise CheckError(f"rank {rank}: rank 0 at {self.place} has gone") from error

    def over(self) -> None:
        """End the wait: torch's own process groups exist."""
        if self._timer is not None:
            self._timer.cancel()
        self._store = None

    def _reach(self, rank: int, host: str, port: int) -> None:
        deadline, reason, said = time.monotonic() + self.timeout, "", False
        while time.monotonic() < deadline:
            try:
                socket.create_connection((host, port), timeout=5).close()
                return
            except OSError as error:
                reason = error.strerror or str(error)
                if os.environ.get(STARTER, str(os.getppid())) != str(os.getppid()):
                    raise CheckError(f"rank {rank}: rank 0, which started it, is gone") from error
                if not said:
                    self._say(f"rank {rank} waits for rank 0 at {self.place} ({reason}), for {self.timeout:g} s")
                said = True
                time.sleep(min(1, self.timeout / 10))
        raise UserError(
            f"rank {rank}: {self.place}, where the processes meet, was not reached in {self.timeout:g} s ({reason}): "
            "see MASTER_ADDR, MASTER_PORT, and whether the first process runs"
        )

    def _wait(self, rank: int, world_size: int, *, start_by_hand: bool) -> None:
        meeting = f"lm/meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._store.set(f"{meeting}/{rank}", "here")
        how = ""
        if start_by_hand and rank == 0:
            host, port = self.place.rsplit(":", 1)
            how = f"; start lm there with MASTER_ADDR={host} MASTER_PORT={port} and NODE_RANK=1, 2, ..."
        say_again = time.monotonic()
        while not self._store.check([f"{meeting}/all"]):
            if rank == 0 and self._store.check([f"{meeting}/{one}" for one in range(world_size)]):
                self._store.set(f"{meeting}/all", "here")
            elif time.monotonic() >= say_again:
                missing = [str(one) for one in range(world_size) if not self._store.check([f"{meeting}/{one}"])]
                who = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
                self._say(
                    f"waiting at {self.place} for {len(missing)} of {world_size} processes, rank {who}, "
                    f"at most {self.timeout:g} s{how}"
                )
                say_again = time.monotonic() + 60
            time.sleep(0.1)

    def _say(self, text: str) -> None:
        if self.says:
            print(log.line(f"note: {text}"), file=sys.stderr, flush=True)

    def _give_up_later(self, what: str) -> None:
        def give_up() -> None:
            end_starter()
            end(what, self.children, 2)

        self._timer = threading.Timer(self.timeout, give_up)
        self._timer.daemon = True
        self._timer.start()


def meet_again(trainer: Trainer, timeout: float) -> None:
    """Let processes that torchrun has restarted meet under a key prefix of their own in its store.

    Its static rendezvous keeps one store for all its restarts (torch 2.13), where they would find the addresses of the
    processes that have died.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if trainer.world_size == 1 or attempt == "0":
        return
    strategy: Any = trainer.strategy
    rank, world_size = trainer.global_rank, trainer.world_size
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=timeout)))
    distributed.init_process_group(
        lightning_internals.backend(strategy),
        store=distributed.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=world_size,
    )


def lost_child(children: list[Any]) -> tuple[str, int] | None:
    """Return which of the ranks that this one started has failed and how, and an exit code; None where none has."""
    for rank, child in enumerate(children, start=1):
        if code := child.poll():
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return f"rank {rank} (process {child.pid}) {how}", max(1, code)
    return None


def end_starter() -> None:
    """Kill rank 0 where it has started this process: if it is suspended, it would hold its device for ever."""
    if os.environ.get(STARTER) == str(os.getppid()):
        os.kill(os.getppid(), signal.SIGKILL)


def end(what: str, children: list[Any], code: int) -> None:
    """End this process, and those it has started, with a line that says why."""
    os.write(2, f"{log.line(what, level='error')}\n".encode())
    for child in children:
        child.kill()
    os._exit(code)  # the main thread may wait for the lost rank in C++, where no exception reaches it
