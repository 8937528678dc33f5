"""Gradients of several processes: what is reduced when. One gloo rank of this process shows the order."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from lm.backprop import Gradients, loss_and_gradients
from lm.errors import UserError
from lm.models import GPT
from lm.training import ManualLanguageModel
from lm.training.compute import blocks
from lm.training.distributed import reduction
from lm.training.distributed.sharding import shard
from tests.support.gradients import batch, make


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Watched(reduction.ReducedGradients):
    """Writes down what happens."""

    def __init__(self, *arguments: object) -> None:
        self.events: list[str] = []
        super().__init__(*arguments)

    def add_rows(self, *arguments: object) -> None:
        self.events.append("embedding")
        super().add_rows(*arguments)

    def _reduce(self, number: int) -> None:
        self.events.append(f"reduce {number}")
        super()._reduce(number)

    def finish(self) -> None:
        self.events.append("finish")
        super().finish()


def test_buckets_are_reduced_while_the_backward_pass_goes_on(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction, "BUCKET", 4000)
    torch.manual_seed(1)
    net = GPT(11, 8, n_layer=3, n_head=2, n_embd=16).double()
    tokens, targets = torch.randint(11, (4, 8)), torch.randint(11, (4, 8))
    with torch.no_grad():
        loss_and_gradients(net, Gradients(), tokens, targets)
        wanted = {name: p.grad.clone() for name, p in net.named_parameters()}
        grads = Watched(net, 1)
        for _ in range(2):  # of a second step nothing of the first is left
            grads.events.clear()
            grads.begin(list(net.parameters()))
            loss_and_gradients(net, grads, tokens, targets, scale=0.5)
            assert "reduce" not in " ".join(grads.events)  # not before the step's last pass
            grads.last_pass()
            loss_and_gradients(net, grads, tokens, targets, scale=0.5)
            before = grads.events[: grads.events.index("embedding", 1)]
            assert len(before) > len(grads.buckets) / 2  # when the last gradient comes, most are on their way
            grads.finish()
            assert sorted(event for event in grads.events if "reduce" in event) == sorted(
                f"reduce {number}" for number in range(len(grads.buckets))
            )
    assert len(grads.buckets) > 5
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-12, atol=1e-14)


def test_a_rule_that_adds_too_often_is_found(one_rank: None) -> None:
    net = torch.nn.Linear(2, 2, bias=False)
    grads = reduction.ReducedGradients(net, 1)
    grads.begin([net.weight])
    grads.last_pass()
    grads.add(net.weight, torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="more often than layers have it"):
        grads.add(net.weight, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["gpt today", "gpt documents", "gated wavenet", "seq2seq", "encoder"])
def test_of_sharded_networks_they_are_those_of_whole_ones(one_rank: None, name: str) -> None:
    whole, net = make(name).eval(), make(name).eval()
    tokens, targets = batch(whole, 3)
    shard(net, init_device_mesh("cpu", (1,)))
    grads, parameters = reduction.ShardedGradients(net), [*net.parameters()]
    parameters[0].requires_grad_(False)
    with torch.no_grad():
        loss_and_gradients(whole, Gradients(), tokens, targets)
        for recomputed in ((), blocks(net)):
            grads.recomputed = recomputed
            grads.begin(parameters)
            for _ in range(2):  # micro-batches
                loss_and_gradients(net, grads, tokens, targets, scale=0.5)
            grads.finish()
            assert parameters[0].grad is None
            for wanted, parameter in zip([*whole.parameters()][1:], parameters[1:], strict=True):
                torch.testing.assert_close(parameter.grad.full_tensor(), wanted.grad, rtol=1e-10, atol=1e-12)


def test_sharded_parameters_are_refused() -> None:
    """FSDP itself needs GPUs; the strategy object does not, so the trainer here is none."""
    module = ManualLanguageModel(net=lambda vocab_size, block_size: GPT(vocab_size, block_size))
    trainer = SimpleNamespace(
        strategy=FSDPStrategy(), precision="32-true", world_size=1, accumulate_grad_batches=1,
        gradient_clip_val=None, gradient_clip_algorithm=None,
    )  # fmt: skip
    module._trainer = trainer
    with pytest.raises(UserError, match="FSDPStrategy with ManualLanguageModel: the rules need whole parameters"):
        module.setup("fit")
