"""What git tracks: sources, not what was built, downloaded or trained."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator

import yaml

from tests.conftest import ROOT
from tests.support.samples import pinned

TESTS = ROOT / "tests"
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


def imported(text: str) -> Iterator[str]:
    """Yield what a test file imports, itself or in programs that are its strings."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = f"tests.{node.module or ''}" if node.level else node.module
            yield from (f"{package}.{one.name}" for one in node.names)
    yield from re.findall(r"^\s*(?:from|import) (tests[.\w]*)", text, re.MULTILINE)


def other_tests(text: str) -> list[str]:
    return [name for name in imported(text) if re.match(r"tests\..*\btest_", name)]


def test_no_test_file_imports_another() -> None:
    assert {path.name: found for path in TESTS.rglob("*.py") if (found := other_tests(path.read_text()))} == {}
    for line in (
        "from tests.a.test_b import c",
        "import tests.test_b",
        "from tests.a import test_b",
        "from .test_b import c",
        "from . import test_b",
        "from ..b import test_c",
        'CODE = """\nfrom tests.a.test_b import c\n"""',
    ):
        assert other_tests(f"from tests.support.cases import often\n{line}\n"), line


APART = {  # what these test has no file of its own
    "backprop/test_mutants.py": "that a wrong rule is found",
    "backprop/test_shapes.py": "all rules, with shapes that Hypothesis draws",
    "checkpoints/test_earlier.py": "what earlier releases wrote",
    "cli/test_bad_input.py": "all commands: bad input",
    "cli/test_commands.py": "all commands: what the contract says of them",
    "cli/test_fuzz.py": "all commands: inputs that are drawn",
    "cli/test_pipes.py": "all commands: pipes in the place of files",
    "cli/test_said.py": "all commands: messages",
    "container/test_image.py": "Dockerfile",
    "posttraining/test_exact.py": "all objectives: the optimum that is known in closed form",
    "support/test_processes.py": "tests/support/processes.py",
    "training/test_batch_size.py": "whole runs: another batch size",
    "training/test_cuda.py": "what only a GPU can show",
    "training/test_devices.py": "whole runs: on a device that is no CPU",
    "training/test_resume.py": "whole runs: stopped and continued",
    "training/test_steps_per_call.py": "whole runs: several steps a call",
    "training/distributed/test_ranks.py": "whole runs: several processes",
}


def test_tests_mirror_the_code() -> None:
    """A file of a folder tests one module or package of lm; those in tests/ itself may test all of the project."""
    files = [path.relative_to(TESTS) for path in TESTS.glob("*/**/test_*.py")]
    assert len(files) > 50
    apart = []
    for file in files:
        name = file.stem.removeprefix("test_")
        folder = ROOT / "lm" / file.parent
        package = folder if name == folder.name else folder / name
        if not (folder / f"{name}.py").is_file() and not (package / "__init__.py").is_file():
            apart.append(str(file))
    assert sorted(apart) == sorted(APART)
