"""The image, built from Dockerfile, and what a newcomer and a cluster do with it.

As an unprivileged user, without a network, without capabilities, on a read-only root.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lm.checkpoints import checkpoint
from tests.conftest import ROOT
from tests.container.image import TAG, Builder, Container, end, missing, process_1, run

pytestmark = pytest.mark.container

USER = 12345
QUICKSTART = ("fit", "--config", "configs/quickstart.yaml", "--trainer.max_steps")


@pytest.fixture(scope="session")
def builder() -> Iterator[Builder]:
    """buildah, with the image built; in $LM_CONTAINER_HOME, if that is set, for the next time too."""
    if why := missing():
        pytest.skip(why)
    kept = os.environ.get("LM_CONTAINER_HOME")
    folder = Path(kept or tempfile.mkdtemp(prefix="lm-container-", dir="/var/tmp"))
    buildah = Builder(folder)
    try:
        began = time.monotonic()
        buildah.base()
        middle = time.monotonic()
        buildah.image()
        print(f"\nbase image {middle - began:.0f} s, Dockerfile {time.monotonic() - middle:.0f} s")
        yield buildah
    finally:
        if not kept:
            buildah.remove()


@pytest.fixture(scope="session")
def image(builder: Builder) -> Iterator[Container]:
    container = Container(builder)
    yield container
    container.remove()


@pytest.fixture
def volumes(tmp_path: Path) -> dict[str, Path]:
    """Folders of the host that belong to the container's user, by where they are mounted."""
    folders = {f"/app/{name}": tmp_path / name for name in ("checkpoints", "logs")}
    for folder in folders.values():
        folder.mkdir()
        os.chown(folder, USER, USER)
    return folders


def test_without_words_it_prints_help_and_an_unknown_command_is_bad_input(image: Container) -> None:
    code, out, _ = image.run()
    assert code == 0 and out.startswith("usage: lm COMMAND") and "\n  fit " in out
    code, out, err = image.run("trian")
    assert code == 2 and not out
    assert err.startswith("error: unknown command trian: say one of fit, ") and len(err.splitlines()) == 1


def test_training_is_stopped_by_sigterm_resumed_and_sampled(image: Container, volumes: dict[str, Path]) -> None:
    """One run from its beginning to a sample; SIGTERM goes to process 1, as `docker stop` sends it."""
    code, out, err = image.run(*QUICKSTART, 20, volumes=volumes)
    assert code == 0 and "step 20/20  val_loss" in out, err

    words = (*QUICKSTART, 100_000, "--name", "stopped", "--ckpt_path", "auto")
    process = image.start(*words, volumes=volumes)
    table = volumes["/app/logs"] / "stopped/metrics.csv"
    while not table.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process_1(process), signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    last = volumes["/app/checkpoints"] / "stopped/last.ckpt"
    step = checkpoint.peek(last).step
    assert process.returncode == 143, err
    assert err.startswith(f"stopped by SIGTERM after step {step};")

    code, out, err = image.run(*QUICKSTART, step + 5, *words[5:], volumes=volumes)
    assert code == 0 and f"training from step {step} to step {step + 5}" in out, err
    written = [path for folder in volumes.values() for path in folder.rglob("*")]
    assert len(written) > 8 and {(path.stat().st_uid, path.stat().st_gid) for path in written} == {(USER, USER)}

    best = "checkpoints/stopped/last.ckpt"
    code, out, err = image.run("sample", "--ckpt_path", best, "--max_new_tokens", 40, volumes=volumes, user=54321)
    assert code == 0 and len(out) > 40, err


@pytest.mark.parametrize("read_only", [True, False])
def test_nothing_need_be_mounted(image: Container, read_only: bool) -> None:
    code, out, err = image.run(*QUICKSTART, 3, read_only=read_only, user=1000)
    assert code == 0 and "step 3/3" in out, err


def test_a_volume_that_is_another_users_is_one_line_before_training(image: Container, volumes: dict[str, Path]) -> None:
    os.chown(volumes["/app/checkpoints"], 0, 0)
    code, out, err = image.run(*QUICKSTART, 3, volumes=volumes)
    assert code == 2 and len(err.splitlines()) == 1 and not out
    assert err.startswith(
        "error: checkpoints/quickstart cannot be written to (Permission denied): checkpoints belongs to"
    )
    assert f"user 0, this is user {USER}" in err and f"chown -R {USER}" in err and "--user 0" in err
    code, out, err = image.run("doctor", volumes=volumes)
    assert code == 1 and "training would fail here: checkpoints" in err


def test_shared_memory_that_is_too_small_is_one_line_before_training(image: Container) -> None:
    small = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    words = (*QUICKSTART, 3, "--data.init_args.num_workers", 2)
    code, _, err = image.run(*words, before=[small])
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith("error: /dev/shm has 0 MiB free, data.num_workers 2 needs") and "--shm-size" in err
    assert image.run(*words)[0] == 0


def test_a_recipe_for_a_gpu_without_one_is_one_line(image: Container) -> None:
    code, _, err = image.run(*QUICKSTART, 3, "--trainer.accelerator", "cuda")
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: trainer.accelerator cuda:"), err
    assert "--gpus all" in err


def test_it_goes_on_without_a_compiler_and_without_a_name_for_its_user(image: Container) -> None:
    code, out, err = image.run(*QUICKSTART, 2, "--model.init_args.compile", "true")
    assert code == 0 and "model.compile: a C++ compiler" in out + err, err
    program = "import getpass, os; print(getpass.getuser(), os.getuid(), os.path.expanduser('~'))"
    assert image.run(command=["python", "-c", program])[1] == f"lm {USER} /tmp\n"


def test_the_installed_packages_are_those_of_the_lock_and_all_is_well(
    image: Container, volumes: dict[str, Path]
) -> None:
    words = ("doctor", "--lock", "/opt/lm/requirements.lock", "--json")
    code, out, err = image.run(*words, volumes=volumes)
    found = {one["name"]: one for one in json.loads(out)["findings"]}
    assert code == 0, err
    assert found["lock"]["verdict"] == "ok" and found["checkpoints"]["value"].startswith("writable")
    assert (ROOT / "requirements.lock").read_text() == (image.root / "opt/lm/requirements.lock").read_text()


def test_gpt2s_ranks_can_be_mounted(image: Container, volumes: dict[str, Path], reference: Path) -> None:
    text = volumes["/app/logs"] / "text.txt"
    text.write_text("hii there\n" * 100)
    words = ("prepare", "--source", "logs/text.txt", "--tokenizer", "gpt2", "--output", "logs/corpus")
    code, out, err = image.run(*words, volumes=volumes | {"/data": reference})
    assert code == 0 and "prepared: logs/corpus" in out, err


def test_what_compose_starts_trains_and_shows_the_curves(image: Container, volumes: dict[str, Path]) -> None:
    """The commands of compose.yaml's services, side by side on the same folders."""
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    words = (*services["train"]["command"], "--trainer.max_steps", 20)
    code, out, err = image.run(*words, volumes=volumes, environment={"LM_LOG": "json"})
    lines = [json.loads(line) for line in (out + err).splitlines()]
    assert code == 0 and {(line["run"], line["rank"]) for line in lines} == {("quickstart", 0)}, err
    assert 'lm_step{run="quickstart"} 20' in (volumes["/app/logs"] / "quickstart/metrics.prom").read_text()

    show = services["tensorboard"]
    board = image.start(command=[*show["entrypoint"], *show["command"]], volumes=volumes)
    try:
        ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:6006/data/runs', timeout=5).read())"
        until = time.monotonic() + 60
        while True:
            words = ["nsenter", "--net", f"--target={process_1(board)}", sys.executable, "-c", ask]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode == 0 and "quickstart" in done.stdout:
                break
            assert board.poll() is None and time.monotonic() < until, done.stderr
            time.sleep(1)
    finally:
        end(board)


def test_what_compose_starts_serves_by_a_key(image: Container, volumes: dict[str, Path], tmp_path: Path) -> None:
    """The serve profile: its command, its secret, its health check; nothing can be written."""
    code, _, err = image.run(*QUICKSTART, 3, volumes=volumes)
    assert code == 0, err
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["serve"]
    words = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in service["command"]]  # its defaults
    keys, inside = tmp_path / "keys.txt", image.root / "run/secrets"
    keys.write_text("open-sesame\n")
    secret = [f"mount -t tmpfs tmpfs {image.root}/run", f"mkdir {inside}", f"install -m 444 {keys} {inside}/keys"]
    server = image.start(*words, volumes=volumes, before=[*secret, f"mount -o remount,bind,ro {image.root}/run"])
    healthy = service["healthcheck"]["test"][-1]
    ask = (
        "import sys, urllib.request as u; r = u.Request('http://127.0.0.1:8000/v1/completions', sys.argv[1].encode(), "
    )
    ask += "{'Content-Type': 'application/json', 'Authorization': sys.argv[2]}); print(u.urlopen(r, timeout=60).read())"

    def within(*program: str) -> subprocess.CompletedProcess[str]:
        words = ["nsenter", "--net", f"--target={process_1(server)}", sys.executable, "-c", *program]
        return subprocess.run(words, capture_output=True, text=True)

    try:
        until = time.monotonic() + 60
        while within(healthy).returncode:
            assert server.poll() is None and time.monotonic() < until, end(server)
            time.sleep(0.5)
        wanted = json.dumps({"model": "quickstart", "prompt": "def ", "max_tokens": 5})
        refused, answered = within(ask, wanted, "Bearer open"), within(ask, wanted, "Bearer open-sesame")
        assert "401" in refused.stderr and '"finish_reason":"length"' in answered.stdout, (refused, answered)
        os.kill(process_1(server), signal.SIGTERM)
        assert server.wait(60) == 143
    finally:
        end(server)


def test_nothing_is_in_it_that_does_not_belong(image: Container, builder: Builder) -> None:
    inside = {path.name for path in (image.root / "app").iterdir()}
    assert inside == {"checkpoints", "cluster", "configs", "logs"}
    site = next((image.root / "opt/lm/lib").glob("python3*/site-packages"))
    assert not list(site.glob("pip")) and (site / "lm/__init__.py").is_file()
    described = builder("inspect", image.name) + builder("inspect", "--type", "image", TAG)
    conf = (builder.folder / "pip.conf").read_text()
    settings = [line.partition(" = ")[2] for line in conf.splitlines()[1:]]
    assert settings
    for setting in (one for one in settings if "/" in one and "ca-certificates" not in one):
        assert setting not in described.replace(f"{setting}:{setting}", "")  # as a mount of the build, not of the image
    assert not (image.root / "run/secrets/pip.conf").exists() and not (image.root / "etc/pip.conf").exists()
    assert image.config["User"] == "1000:1000"
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.title"] == "lm" and labels["org.opencontainers.image.licenses"] == "MIT"
    assert (
        labels["org.opencontainers.image.version"]
        == re.search(r'version = "(.+)"', (ROOT / "pyproject.toml").read_text())[1]
    )


def test_it_is_small_and_says_where_its_bytes_are(builder: Builder, tmp_path: Path) -> None:
    """Compressed, as a registry has it and a node downloads it."""
    target = builder.folder / "pushed"
    builder("push", "--quiet", TAG, f"dir:{target}")
    try:
        manifest = json.loads((target / "manifest.json").read_text())
        sizes = [layer["size"] for layer in manifest["layers"]]
        print(f"\ncompressed {sum(sizes) / 1e6:.0f} MB: layers {', '.join(f'{size / 1e6:.1f}' for size in sizes)}")
        assert sum(sizes) <= 700e6
    finally:
        shutil.rmtree(target)


def test_a_change_of_the_source_installs_no_dependency_again(builder: Builder, tmp_path: Path) -> None:
    context = tmp_path / "context"
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in (name for name in listed if (ROOT / name).is_file()):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, context / name)
    with (context / "lm/__init__.py").open("a") as file:
        file.write("\n# changed\n")
    (context / "checkpoints/run").mkdir(parents=True)
    (context / "checkpoints/run/last.ckpt").write_bytes(b"secret")
    before = layers(builder)
    try:
        builder.image(context)
        after = layers(builder)
        assert len(before) == len(after) and before != after
        biggest = 2  # the base, the folders, and then the dependencies
        assert before[: biggest + 1] == after[: biggest + 1]
    finally:
        builder.image()  # as it was


def layers(builder: Builder) -> list[str]:
    return json.loads(builder("inspect", "--type", "image", TAG))["OCIv1"]["rootfs"]["diff_ids"]
