"""What git tracks: sources, not what was built, downloaded or trained."""

import re
import subprocess
import tomllib

import yaml

from tests.conftest import ROOT
from tests.support.samples import pinned

LARGEST = 300_000  # bytes
BUILT = (".whl", ".ckpt", ".safetensors", ".pt", ".pth", ".tiktoken", ".parquet", ".so", ".zip", ".gz")


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_nothing_large_and_nothing_built() -> None:
    names = tracked()
    assert "pyproject.toml" in names
    assert [name for name in names if (ROOT / name).stat().st_size > LARGEST] == []
    kept = "tests/fixtures/"  # checkpoints and the like that earlier code wrote
    assert [name for name in names if name.endswith(BUILT) and not name.startswith(kept)] == []


def test_a_commit_is_checked_by_the_same_bound_and_the_tested_ruff() -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook for repository in repositories for hook in repository["hooks"]}
    assert f"--maxkb={LARGEST // 1000}" in hooks["check-added-large-files"]["args"]
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", repository["rev"]) for repository in repositories)
    ruff = next(one for one in repositories if "ruff" in one["repo"])
    assert ruff["rev"] == f"v{pinned('constraints.txt')['ruff']}"


def test_what_commands_leave_behind_is_ignored() -> None:
    """Of the commands in README and docs."""
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    outputs = re.findall(r"^lm .*--output (\S+)", "\n".join(texts), flags=re.MULTILINE)
    assert len(outputs) >= 4
    left = ["site/index.html", "checkpoints/tiny/last.ckpt", "logs/tiny/metrics.csv", "some-1.0-py3-none-any.whl"]
    left += [name if "." in name else f"{name}/file" for name in outputs]
    done = subprocess.run(["git", "check-ignore", *left], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == left


def test_types_are_checked_strictly() -> None:
    """All of strict, but that a call of an nn.Module returns Any."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["strict"] is True and settings["packages"] == ["lm"]
    relaxed = {key for one in settings["overrides"] for key in one if any(name[:3] == "lm." for name in one["module"])}
    assert relaxed == {"module", "warn_return_any"}
    assert not any(value is False for key, value in settings.items() if key != "overrides")
