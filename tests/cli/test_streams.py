"""Standard output that is full, or that cannot hold what is said."""

import pytest

from tests.conftest import start


@pytest.mark.parametrize("words", [("--help",), ("doctor",)])
def test_a_full_standard_output(tmp_path, words: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        process = start(*words, cwd=tmp_path, stdout=full)
        err = process.communicate(timeout=120)[1]
    assert (process.returncode, err.count("\n")) == (2, 1), err
    assert err.startswith("error: standard output cannot be written to (No space left on device)")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_narrow_encoding(tmp_path, encoding: str) -> None:
    process = start("é☃", cwd=tmp_path, fresh=True, environment={"PYTHONIOENCODING": encoding}, text=False)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and b"Traceback" not in out + err
