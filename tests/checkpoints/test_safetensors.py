"""What is exported comes back as it was, can hold no code, and can be read by whoever reads safetensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lm.checkpoints import checkpoint
from lm.checkpoints.restore import load_network
from tests.support.runs import assert_equal

LAST = Path("checkpoints/tiny/last.ckpt")


@pytest.fixture
def exported(lm, workplace: Path) -> Path:
    assert lm("fit", "--config", "tiny.yaml")[0] == 0
    code, out, _ = lm("export", "--ckpt_path", LAST, "--format", "safetensors", "--output", "out", "--json")
    assert code == 0 and json.loads(out) == {"path": "out"}
    return workplace / "out"


def test_weights_come_back_to_the_last_bit_and_tied_ones_tied(lm, exported: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    saved = torch.load(LAST, weights_only=True)
    assert "lm_head.weight" not in weights and json.loads((exported / "lm.json").read_text())["same"]
    for name, value in weights.items():
        assert torch.equal(value, saved["state_dict"][f"net.{name}"]), name
    assert lm("import", "--source", "out", "--output", "back.ckpt")[:2] == (0, "imported: back.ckpt\n")
    back = torch.load("back.ckpt", weights_only=True)
    assert_equal(back["state_dict"], saved["state_dict"])
    assert back["state_dict"]["net.lm_head.weight"].data_ptr() == back["state_dict"]["net.wte.weight"].data_ptr()
    assert back["global_step"] == saved["global_step"] == load_network(Path("back.ckpt")).step
    for command in (("sample", "--max_new_tokens", 20), ("validate",)):
        a, b = (lm(*command, "--ckpt_path", path)[1] for path in (LAST, "back.ckpt"))
        assert a == b and a


def test_what_was_imported_begins_runs_and_is_not_gone_on_with(lm, exported: Path) -> None:
    assert lm("import", "--source", "out", "--output", "back.ckpt")[0] == 0
    code, _, err = lm("fit", "--config", "tiny.yaml", "--name", "on", "--ckpt_path", "back.ckpt")
    assert code == 2 and "back.ckpt has no optimizer's state" in err and "--init_from back.ckpt" in err
    assert len(err.splitlines()) == 1
    assert lm("fit", "--config", "tiny.yaml", "--name", "new", "--init_from", "back.ckpt")[0] == 0


def test_one_file_has_everything(lm, exported: Path) -> None:
    assert lm("export", "--ckpt_path", LAST, "--format", "file", "--output", "one.ckpt")[0] == 0
    assert_equal(checkpoint.load(Path("one.ckpt")), checkpoint.load(LAST))


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        ("no folder", "there is no such file or folder"),
        ("no JSON", "it is not what lm export writes"),
        ("half the weights", "it is not what lm export writes"),
        ("another network's weights", "it is not what lm export writes"),
        ("no class", "the network os.system cannot be made: it could run any code"),
    ],
)
def test_bad_input_is_one_line(lm, exported: Path, harm: str, expected: str) -> None:
    rest, weights = exported / "lm.json", exported / "model.safetensors"
    if harm == "no folder":
        exported.rename("away")
    elif harm == "no JSON":
        rest.write_text("{")
    elif harm == "half the weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        values = json.loads(rest.read_text())
        if harm == "no class":
            values["config"]["model"]["init_args"]["net"]["class_path"] = "os.system"
        else:
            values["vocab_size"] += 1
        rest.write_text(json.dumps(values))
    code, _, err = lm("import", "--source", "out", "--output", "back.ckpt")
    assert code == 2 and expected in err and len(err.splitlines()) == 1
    assert not Path("back.ckpt").exists()


def test_an_output_that_cannot_be_written(lm, exported: Path) -> None:
    code, _, err = lm("export", "--ckpt_path", LAST, "--output", "tiny.yaml")
    assert code == 2 and err.startswith("error: --output tiny.yaml: ") and len(err.splitlines()) == 1


class Killed(BaseException):
    pass


CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir")


def test_a_folder_that_is_replaced_is_whole_wherever_the_process_is_killed(lm, exported: Path) -> None:
    """From the i-th call on, none does anything, as after SIGKILL."""
    words = ("export", "--ckpt_path", "checkpoints/tiny/last.ckpt", "--format", "safetensors", "--output")
    folder = Path("again")
    assert lm(*words, folder)[0] == 0
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    for i in range(99):
        left = [i]

        def dying(call, left=left):
            def called(self, *arguments, **settings):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return call(self, *arguments, **settings)

            return called

        done = True
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(Path, name, dying(getattr(Path, name)))
            try:
                lm(*words, folder, "--overwrite")
            except Killed:
                done = False
        assert lm("import", "--source", folder, "--output", f"{i}.ckpt")[0] == 0, i
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == good, i
        if done:
            break
    assert done and i > 4
    assert not list(Path().glob(".again.old.part"))
