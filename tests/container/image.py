"""The image, built from Dockerfile without an engine or a registry, and containers of it as Docker would run them.

buildah builds in chroot isolation, on a base image that debootstrap makes. A container is the image's root file system
with its environment, its working directory and its entry point, in namespaces of its own (mounts, processes, network),
as an unprivileged user without capabilities; its root is read-only where that is asked for.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

TOOLS = ("buildah", "debootstrap", "unshare", "ip")
BASE, TAG = "localhost/python:3.11-slim-bookworm", "localhost/lm:cpu"
INCLUDED = "python3,python3-venv,python3-pip,ca-certificates"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def missing() -> str | None:
    """What there is not, of what the building takes; None where all is there."""
    if os.getuid():
        return "building an image here needs root"
    lacking = [tool for tool in TOOLS if not shutil.which(tool)]
    return f"missing here: {', '.join(lacking)} (apt-get install buildah debootstrap iproute2)" if lacking else None


def run(*words: object, **settings: Any) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, **settings)
    assert done.returncode == 0, f"{words}: {done.stdout[-3000:]} {done.stderr[-3000:]}"
    return done.stdout


class Builder:
    """buildah with a store of its own under a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        self.environment = {**os.environ, "TMPDIR": str(folder / "tmp")}

    def __call__(self, *words: object, **settings: Any) -> str:
        store = ("--root", self.folder / "store", "--runroot", self.folder / "run", "--storage-driver", "overlay")
        return run("buildah", *store, *words, env=self.environment, **settings)

    def has(self, tag: str) -> bool:
        return bool(self("images", "--quiet", "--filter", f"reference={tag}"))

    def base(self) -> None:
        """Make what stands in for python:3.11-slim-bookworm: Debian's own Python, from where apt is set up to go."""
        if self.has(BASE):
            return
        root = self.folder / "base"
        run(
            "debootstrap",
            "--variant=minbase",
            f"--include={INCLUDED}",
            "bookworm",
            root,
            mirror(),
            env=self.environment,
        )
        for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            marker.unlink()
        (root / "usr/bin/python").symlink_to("python3")
        for waste in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(root / waste)
        name = self("from", "scratch").strip()
        self("add", "--quiet", name, root, "/")
        self("commit", "--quiet", name, BASE)
        self("rm", name)
        shutil.rmtree(root)

    def image(self, context: Path = ROOT, *words: object) -> None:
        """Build Dockerfile's default target, with pip set up as it is here."""
        conf = self.folder / "pip.conf"
        conf.write_text(pip_conf())
        mounted = [f"{CERTIFICATES}:{CERTIFICATES}:ro"] if CERTIFICATES.exists() else []
        mounted += [f"{folder}:{folder}:ro" for folder in pip_settings().get("find-links", "").split()]
        volumes = [word for one in mounted for word in ("--volume", one)]
        self(
            "bud", "--pull-never", "--layers", "--format", "docker", "--isolation", "chroot",
            "--secret", f"id=pip.conf,src={conf}", "--build-arg", "TORCH_INDEX=", *volumes, *words, "-t", TAG, context,
        )  # fmt: skip

    def remove(self) -> None:
        self("rm", "--all")
        shutil.rmtree(self.folder, ignore_errors=True)


def mirror() -> str:
    """Where apt is set up to get Debian from."""
    urls = run("apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(CREATED_BY)").splitlines()
    return next(line.split()[0] for line in urls if line.split()[1:2] == ["bookworm"])


def pip_settings() -> dict[str, str]:
    """What pip is told here, by files and by the environment; the latter wins."""
    pip = [os.environ.get("PIP", "pip3"), "config", "list"]
    rows = [line.split("=", 1) for line in run(*pip).splitlines() if "=" in line]
    return {key.rpartition(".")[2]: value.strip("'") for key, value in sorted(rows, reverse=True)}


def pip_conf() -> str:
    kept = {k: v for k, v in pip_settings().items() if k in ("cert", "find-links", "index-url", "timeout")}
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in kept.items())


class Container:
    """A container of the image, from the first to the last command."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.name = builder("from", "--pull-never", TAG).strip()
        self.root = Path(builder("mount", self.name).strip())
        self.config = json.loads(builder("inspect", self.name))["OCIv1"]["config"]

    def start(
        self,
        *words: object,
        user: int = 12345,
        volumes: Mapping[str, Path] = {},
        environment: Mapping[str, str] = {},
        read_only: bool = True,
        command: list[str] | None = None,
        before: Sequence[str] = (),
    ) -> subprocess.Popen[str]:
        """Start a command, `docker run --user … --network none --cap-drop ALL --read-only --tmpfs /tmp -v …`.

        The process that is returned is the container's process 1: its pid can be sent signals.
        """
        root = shlex.quote(str(self.root))
        place = [f"mount --bind {shlex.quote(str(host))} {root}{path}" for path, host in volumes.items()]
        # volumes that nobody mounts are folders of their own, writable whatever the root is
        place += [
            f"mount -t tmpfs -o mode=1777 tmpfs {root}{path}" for path in self.config["Volumes"] if path not in volumes
        ]
        script = [
            "set -e",
            "mount --make-rprivate /",
            f"mount --bind {root} {root}",
            f"echo 127.0.0.1 localhost > {root}/etc/hosts",  # an engine writes one into every container
            f"mount -o remount,bind,{'ro' if read_only else 'rw'} {root}",
            f"mount -t proc proc {root}/proc",
            f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp",
            f"mount -t tmpfs -o mode=755 tmpfs {root}/dev",
            f"mkdir -m 1777 {root}/dev/shm",
            *(
                f"touch {root}/dev/{d}; mount --bind /dev/{d} {root}/dev/{d}"
                for d in ("null", "zero", "urandom", "random")
            ),
            *place,
            *(one.replace(" /dev/", f" {root}/dev/") for one in before),
            "ip link set lo up",
        ]
        variables = dict(one.split("=", 1) for one in self.config["Env"]) | {"OMP_NUM_THREADS": "1"} | dict(environment)
        entry = command or [*self.config["Entrypoint"], *(map(str, words) if words else self.config["Cmd"])]
        drop = [
            "setpriv",
            f"--reuid={user}",
            f"--regid={user}",
            "--clear-groups",
            "--no-new-privs",
            "--bounding-set=-all",
        ]
        inside = ["sh", "-c", f'cd {self.config["WorkingDir"]} && exec "$@"', "sh", *drop, "--inh-caps=-all", *entry]
        outside = [
            "env",
            "-i",
            *(f"{key}={value}" for key, value in variables.items()),
            "chroot",
            str(self.root),
            *inside,
        ]
        script.append(f"exec {shlex.join(outside)}")
        return subprocess.Popen(
            ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "sh", "-c", "\n".join(script)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def run(self, *words: object, **settings: Any) -> tuple[int, str, str]:
        """Run a command to its end; returns its exit code, standard output and standard error."""
        process = self.start(*words, **settings)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def remove(self) -> None:
        self.builder("umount", self.name)
        self.builder("rm", self.name)


def process_1(container: subprocess.Popen[str]) -> int:
    """The pid, on this machine, of a container's process 1, once it is there."""
    while not (children := Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()):
        assert container.poll() is None, container.communicate()
        time.sleep(0.01)
    return int(children[0])


def end(container: subprocess.Popen[str]) -> None:
    """Kill a container's process 1, and with it all that is inside."""
    if container.poll() is None:
        os.kill(process_1(container), signal.SIGKILL)
    container.communicate(timeout=30)
