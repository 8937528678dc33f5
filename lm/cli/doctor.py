"""`lm doctor`: check what matters for training on this machine, and say what to change."""

import ctypes
import math
import os
import platform
import re
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lm import __version__, storage
from lm.checkpoints import disk
from lm.cli import common, plain_help, values
from lm.errors import CheckError, UserError
from lm.generation.packed import has_instructions
from lm.training import compute

GIB = 1 << 30
MARKS = {"ok": " ", "note": "!", "fail": "X"}


class Finding(NamedTuple):
    """What a check found."""

    name: str
    value: str
    verdict: Literal["ok", "note", "fail"] = "ok"
    """note: something is slower, or missing for some uses; fail: training would fail."""
    advice: str = ""


def versions() -> Iterator[Finding]:
    """Look for packages that are missing, or of a release that lm does not work with."""
    yield Finding("lm", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}")
    for text in metadata.requires("lm") or []:
        needed = Requirement(text)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            yield Finding(needed.name, "missing", "fail", "install it: pip install -c constraints.txt lm")
            continue
        if needed.specifier.contains(found, prereleases=True):
            yield Finding(needed.name, found)
        else:
            yield Finding(needed.name, found, "fail", f"install {needed}")


def locked(lock: Path) -> Finding:
    """Compare the installed packages with a lock: each at its version, and no others but lm and installers.

    Raises:
        UserError: There is no such lock.
    """
    try:
        text = storage.plain(lock).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--lock {lock}: {getattr(error, 'strerror', None) or error}") from error
    wanted = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, flags=re.MULTILINE))
    if not wanted:
        raise UserError(f"--lock {lock}: it names no package: say a requirements.lock")
    found = {canonicalize_name(one.name): one.version for one in metadata.distributions()}
    wrong = [
        f"{name} {found.get(name, 'missing')} for {version}"
        for name, version in wanted.items()
        if found.get(name) != version
    ]
    wrong += sorted(found.keys() - wanted.keys() - {"lm", "pip", "setuptools", "wheel"})
    if wrong:
        return Finding(
            "lock", ", ".join(wrong), "fail", f"install {lock} into a new environment, with --require-hashes"
        )
    return Finding("lock", f"{len(wanted)} packages, as in {lock}")


def devices() -> Iterator[Finding]:
    """Check the devices, and compute on each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    verdict: Literal["ok", "note"] = "note" if threads > cores else "ok"
    yield Finding("CPU cores", f"{cores}, {threads} threads", verdict, "set OMP_NUM_THREADS to the number of cores")
    yield _compiler(torch.device("cpu"))
    if has_instructions():
        yield Finding("lm sample --dtype", "bfloat16 and int8: the CPU multiplies them")
    else:
        yield Finding("lm sample --dtype", "float32: the CPU has no instructions for bfloat16, which would be slower")
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        built = torch.version.cuda or torch.version.hip
        there = Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia").exists()
        if there:
            advice = "torch cannot use it: " + ("see nvidia-smi and the driver" if built else "install a CUDA build")
            yield Finding("GPU", "one is there, torch sees none", "fail", advice)
        else:
            yield Finding(
                "GPU", "none", "note", "training runs on the CPU; docker run --gpus all gives a container one"
            )
        yield Finding("precision", "32-true, 64-true, bf16-mixed, bf16-true (a CPU: 16 bits save memory, seldom time)")
        return
    for number in range(torch.accelerator.device_count()):
        device = torch.device(kind.type, number)
        try:
            torch.ones(256, 256, device=device).square().sum().item()
        except RuntimeError as error:
            yield Finding(str(device), str(error).splitlines()[0], "fail", "see nvidia-smi: the device does not work")
            continue
        name, size = kind.type, ""
        if kind.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            name, size = torch.cuda.get_device_name(device), f", {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        yield Finding(str(device), name + size)
    half = kind.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    advice = "use --trainer.precision 16-mixed, with loss scaling"
    yield Finding("bf16", "yes" if half else "no", "ok" if half else "note", advice)
    yield _compiler(kind)


def _compiler(device: torch.device) -> Finding:
    missing = compute.compiler_missing(device)
    advice = f"model.compile goes on without: install {missing}"
    return Finding(
        f"torch.compile on {device.type}", f"lacks {missing}" if missing else "yes", "note" if missing else "ok", advice
    )


def memory() -> Iterator[Finding]:
    """Check memory, shared memory and open files."""
    total, free = compute.memory()
    if total == math.inf:
        return
    verdict: Literal["ok", "fail"] = "ok" if free > GIB // 2 else "fail"
    value = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    yield Finding(
        "memory", value, verdict, "lm itself takes half a GiB: end other programs, or raise the container's limit"
    )
    if Path("/dev/shm").exists():
        size = shutil.disk_usage("/dev/shm").free
        enough: Literal["ok", "note"] = "ok" if size >= GIB // 2 else "note"
        advice = "several GPUs and data.num_workers use it: docker run --shm-size 2g"
        yield Finding("/dev/shm", f"{size / GIB:.2f} GiB free", enough, advice)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few: Literal["ok", "note", "fail"] = "fail" if soft < 64 else "note" if soft < 1024 else "ok"
    yield Finding("open files", f"at most {soft}", few, "ulimit -n 4096, or docker run --ulimit nofile=4096")


def folders() -> Iterator[Finding]:
    """Check that a run can write its files."""
    for folder in (Path("checkpoints"), Path("logs"), storage.data_home()):
        there = folder.exists()
        try:
            disk.probe(folder)
        except UserError as error:
            optional = folder == storage.data_home()
            advice = "downloads and prepared texts cannot be kept there" if optional else str(error)
            yield Finding(str(folder), "not writable", "note" if optional else "fail", advice)
            continue
        free = shutil.disk_usage(folder).free
        scarce: Literal["ok", "note"] = "ok" if free > 5 * GIB else "note"
        yield Finding(
            str(folder), f"writable, {free / GIB:.1f} GiB free", scarce, "GPT-2's checkpoints take 1.5 GB each"
        )
        if not there:
            folder.rmdir()
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        yield Finding("temporary files", str(error), "note", "set TMPDIR, or docker run --tmpfs /tmp")


def network() -> Iterator[Finding]:
    """Check that processes of this machine, and of others, can connect."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        yield Finding("loopback", str(error), "fail", "several processes meet there: ip link set lo up")
    else:
        yield Finding("loopback", "yes")
    state = "/sys/class/net/{}/operstate"
    down = {name for _, name in socket.if_nameindex() if _read(state.format(name)) == "down"}
    names = [name for _, name in socket.if_nameindex() if name not in {"lo", *down}]
    chosen = {key: os.environ[key] for key in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if key in os.environ}
    several = len(names) > 1 and not chosen
    value = ", ".join(names) or "none but lo"
    advice = "several machines: say which leads to the others, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
    yield Finding("interfaces", value + (f", {chosen}" if chosen else ""), "note" if several else "ok", advice)
    wrong = [
        name for name in chosen.values() if not any(there.startswith(name.lstrip("^=")) for there in [*names, "lo"])
    ]
    if wrong:
        yield Finding("chosen interface", f"there is no {wrong[0]}", "fail", f"say one of {', '.join(names)}")
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
        yield Finding("host name", f"{host} is {address}")
    except OSError:
        yield Finding("host name", f"{host} has no address", "note", "several machines: set MASTER_ADDR to an address")
    if master := os.environ.get("MASTER_ADDR"):
        try:
            yield Finding("MASTER_ADDR", f"{master} is {socket.gethostbyname(master)}")
        except OSError as error:
            yield Finding("MASTER_ADDR", f"{master}: {error}", "fail", "set it to the first machine's name or address")


def _read(path: str) -> str:
    return Path(path).read_text().strip() if Path(path).exists() else ""


def clock() -> Iterator[Finding]:
    """Check that the clock can be right: logs, TensorBoard and downloads' certificates depend on it."""
    now, installed = time.time(), Path(torch.__file__).stat().st_ctime
    written = max((path.stat().st_mtime for path in Path("logs").glob("*/metrics.csv")), default=0.0)
    stamp = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    if now < installed - 86400:
        yield Finding(
            "clock", f"{stamp}, before torch was installed", "note", "set it: certificates and curves go by it"
        )
    elif now < written - 60:
        yield Finding("clock", f"{stamp}, before the newest log", "note", "curves of TensorBoard will go back in time")
    else:
        yield Finding("clock", stamp)
    if _kept_right() is False:
        advice = "start chrony or ntpd where the machines' logs are to be compared"
        yield Finding("clock synchronization", "none, as far as the kernel knows", "note", advice)


def _kept_right() -> bool | None:
    """Return whether the kernel thinks its clock is synchronized; None where it cannot be asked."""
    try:
        answer = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # a struct timex of zeros only queries
    except (AttributeError, OSError, TypeError):
        return None
    return answer != 5 if answer >= 0 else None  # TIME_ERROR


CHECKS = (versions, devices, memory, folders, network, clock)


def doctor(arguments: list[str]) -> None:
    """Run `lm doctor`.

    Raises:
        CheckError: Training would fail here.
    """
    parser = plain_help.make_parser(
        "doctor", "Say what of this machine matters to training, and what to change. Exit 1: training would fail."
    )
    parser.add_argument("--lock", type=Path | None, default=None, help="Hold installed packages against this lock.")
    parser.add_argument("--json", action="store_true", help="Print the findings as JSON; the table goes to stderr.")
    options = values.parse(parser, arguments)
    found = [finding for check in CHECKS for finding in check()]
    if options.lock is not None:
        found.append(locked(options.lock))
    out, width = common.output(options.json), max(len(one.name) for one in found)
    for one in found:
        advice = f"  -> {one.advice}" if one.verdict != "ok" else ""
        print(f"{MARKS[one.verdict]} {one.name:<{width}}  {one.value}{advice}", file=out)
    wrong = [one.name for one in found if one.verdict == "fail"]
    if options.json:
        rows = [one._asdict() | {"advice": "" if one.verdict == "ok" else one.advice} for one in found]
        common.print_json({"ok": not wrong, "findings": rows})
    if wrong:
        raise CheckError(f"training would fail here: {', '.join(wrong)}: see the lines with X")
