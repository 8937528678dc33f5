"""A class that is no such part is refused, and so is a network whose training does not fit into memory."""

from pathlib import Path

import pytest
import torch

from lm.models import GPT
from lm.training import compute, optimizers, parts

NET = "--model.init_args.net"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((NET, "torch.nn.ReLU"), "model.net: it cannot be made of vocab_size and block_size"),
        ((NET, "torch.nn.Linear"), "model.net Linear is no network for tokens"),
        (("--model.init_args.optimizer", "torch.optim.SparseAdam"), "model.optimizer SparseAdam: it is for sparse"),
        (("--model.init_args.optimizer", "torch.optim.LBFGS"), "model.optimizer"),
        (("--data", "lightning.pytorch.LightningDataModule"), "data LightningDataModule: it is not an lm.data"),
        ((f"{NET}.init_args.n_embd", 2 * 10**9), "memory does not suffice"),
    ],
)
def test_classes_and_sizes_that_cannot_be(lm, words: tuple, expected: str) -> None:
    code, _, err = lm("fit", "--config", "tiny.yaml", *words)
    assert code == 2 and err.startswith(f"error: {expected}") and err.count("\n") == 1, err


def bytes_of(net: torch.nn.Module) -> int:
    return sum(p.nbytes for p in net.parameters())


@pytest.mark.parametrize("command", ["fit", "gradients"])
@pytest.mark.parametrize("times", [1.5, 4, 8])
def test_what_training_needs_is_held_against_what_is_free(
    lm, workplace: Path, monkeypatch: pytest.MonkeyPatch, times: float, command: str
) -> None:
    """Weights, gradients, AdamW's two moments, and of all but gradients the copy that is saved: seven times."""
    size = bytes_of(GPT(46, 16, n_layer=1, n_head=2, n_embd=16))
    monkeypatch.setattr(compute, "memory", lambda: (64e9, times * size))
    code, out, err = lm(command, "--config", "tiny.yaml")
    if command == "fit" and times < 7:
        assert code == 2 and len(err.splitlines()) == 1 and "optimizer's state and the copy that is saved take" in err
        assert not Path("checkpoints/tiny").exists()
    else:
        assert code == 0, out + err


def test_the_optimizers_own_state_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    size = bytes_of(GPT(46, 16, n_layer=1, n_head=2, n_embd=16))

    def make(vocab_size: int, block_size: int) -> GPT:
        return GPT(vocab_size, block_size, n_layer=1, n_head=2, n_embd=16)

    makers = {
        "SGD": (torch.optim.SGD, 3),
        "momentum": (lambda p: torch.optim.SGD(p, momentum=0.9), 5),
        "AdamW": (optimizers.adamw, 7),
    }
    for name, (maker, times) in makers.items():
        for free, fits in ((times - 0.5, False), (times + 0.5, True)):
            monkeypatch.setattr(compute, "memory", lambda free=free: (64e9, free * size))
            try:
                parts.make_net(make, 46, 16, optimizer=maker)
            except parts.UserError:
                assert not fits, name
            else:
                assert fits, name


def test_layers_beyond_number_are_counted_at_once(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    init = GPT.__init__

    def counting(self: GPT, *arguments: int, n_layer: int = 1, **settings: object) -> None:
        made.append(n_layer)
        init(self, *arguments, n_layer=n_layer, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(GPT, "__init__", counting)
    words = ("--model.init_args.net.init_args.n_layer", 65536, "--model.init_args.net.init_args.n_embd", 1024)
    code, _, err = lm("fit", "--config", "tiny.yaml", *words)
    assert code == 2 and "825," in err and "parameters" in err and len(err.splitlines()) == 1, err
    assert not made or max(made) <= 3


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 6000 kB\n")
    assert compute.memory(tmp_path) == (8000 << 10, 6000 << 10)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert compute.memory(tmp_path) == (8000 << 10, 6000 << 10)
    (group / "memory.max").write_text(f"{4000 << 10}\n")
    assert compute.memory(tmp_path) == (4000 << 10, 4000 << 10)
    (group / "memory.current").write_text(f"{3000 << 10}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {1000 << 10}\n")
    assert compute.memory(tmp_path) == (4000 << 10, 2000 << 10)
