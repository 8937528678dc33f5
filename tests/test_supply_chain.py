"""What is installed, where it comes from, and that all places say the same of it."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.support.samples import pinned

LOCKS = ("requirements.lock", "requirements-cuda.lock")


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_hashes_and_the_constraints_version(name: str) -> None:
    text = (ROOT / name).read_text()
    blocks = re.split(r"\n(?=[\w.-]+==)", text)[1:]
    assert len(blocks) > 40
    assert [block for block in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}", block)] == []
    constraints, locked = pinned("constraints.txt"), pinned(name)
    assert {p: v for p, v in locked.items() if p in constraints and v.split("+")[0] != constraints[p]} == {}
    only_on_gpus = locked.keys() - constraints.keys()
    assert all(re.match("nvidia-|cuda-|triton|setuptools", package) for package in only_on_gpus)
    assert bool(only_on_gpus - {"setuptools"}) == ("cuda" in name)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_all_that_lm_depends_on(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = pinned(name)
    for text in project["dependencies"]:
        needed = Requirement(text)
        if needed.marker is None or needed.marker.evaluate({"python_version": "3.11"}):
            assert needed.specifier.contains(locked[canonicalize_name(needed.name)]), text


def test_what_is_installed_here_is_what_was_locked() -> None:
    """Of what the lock has: the tests' own packages are in constraints.txt alone."""
    for package, version in pinned("requirements.lock").items():
        assert metadata.version(package).split("+")[0] == version.split("+")[0], package
    constraints = pinned("constraints.txt")
    installed = {canonicalize_name(one.name): one.version.split("+")[0] for one in metadata.distributions()}
    assert {p: v for p, v in installed.items() if p in constraints and v != constraints[p]} == {}


def test_pip_audit_reads_the_lock() -> None:
    """Its question to a server is left out: there may be no network."""
    if not any(one.name == "pip_audit" for one in metadata.distributions()):
        pytest.skip("pip-audit is in the extra dev")
    words = ["--disable-pip", "--require-hashes", "--dry-run", "--requirement", str(ROOT / "requirements.lock")]
    done = subprocess.run([sys.executable, "-m", "pip_audit", *words], capture_output=True, text=True)
    assert done.returncode == 0 and f"audited {len(pinned('requirements.lock'))} packages" in done.stderr, done.stderr


def test_no_place_names_where_packages_came_from() -> None:
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    texts = {name: (ROOT / name).read_text(errors="replace") for name in found if name and (ROOT / name).is_file()}
    for name in LOCKS:
        assert "://" not in texts[name] and "--index-url" not in texts[name] and "--find-links" not in texts[name]
