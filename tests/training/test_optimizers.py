import pytest
import torch

from lm.errors import UserError
from lm.models import GPT, MLP, Bigram, GatedWaveNet
from lm.training.optimizers import MuonAdamW, parameter_groups
from tests.support.runs import assert_equal


def net_of(tie_weights: bool = True) -> GPT:
    torch.manual_seed(0)
    return GPT(11, 8, n_layer=1, n_head=2, n_embd=8, tie_weights=tie_weights)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        tokens = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.roll(-1).flatten()).backward()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()


@pytest.mark.parametrize(
    ("net", "tables", "hidden"),
    [
        (net_of(), {"wte.weight", "wpe.weight"}, 4),
        (net_of(tie_weights=False), {"wte.weight", "wpe.weight", "lm_head.weight"}, 4),
        (MLP(11, 3), {"wte.weight", "lm_head.weight"}, 1),
        (Bigram(11, 3), {"table.weight"}, 0),
    ],
)
def test_each_parameter_is_in_the_group_of_its_kind(net: torch.nn.Module, tables: set[str], hidden: int) -> None:
    names = {id(p): name for name, p in net.named_parameters()}
    groups = parameter_groups(net)
    found = [[names[id(p)] for p in group["params"]] for group in groups]
    assert groups[0]["n_hidden"] == hidden
    assert set(found[0][hidden:]) == tables
    assert all(dict(net.named_parameters())[name].ndim < 2 for group in found[1:] for name in group)
    assert [group.get("weight_decay") for group in groups] == [None, 0.0][: len(groups)]
    assert sorted(name for group in found for name in group) == sorted(names.values())


def test_convolutions_are_no_matrices_for_muon() -> None:
    matrices = parameter_groups(GatedWaveNet(11, 8))[0]
    assert {p.ndim for p in matrices["params"][: matrices["n_hidden"]]} == {2}
    assert 3 in {p.ndim for p in matrices["params"][matrices["n_hidden"] :]}


def test_it_is_torchs_muon_and_torchs_adamw_with_one_schedule() -> None:
    ours, theirs = net_of(), net_of()
    train(ours, MuonAdamW(parameter_groups(ours), lr=1e-3, muon_lr=0.02), 5)
    matrices, vectors = parameter_groups(theirs)
    hidden, tables = matrices["params"][: matrices["n_hidden"]], matrices["params"][matrices["n_hidden"] :]
    muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, adjust_lr_fn="original")
    adamw = torch.optim.AdamW([{"params": tables}, vectors], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    class Both:
        def __init__(self) -> None:
            self.param_groups = [*muon.param_groups, *adamw.param_groups]

        def zero_grad(self) -> None:
            muon.zero_grad(), adamw.zero_grad()

        def step(self) -> None:
            muon.step(), adamw.step()

    train(theirs, Both(), 5)
    assert_equal(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_its_state_is_saved_and_loaded_exactly() -> None:
    whole, parts = net_of(), net_of()
    train(whole, MuonAdamW(parameter_groups(whole)), 6)
    first = MuonAdamW(parameter_groups(parts))
    train(parts, first, 3)
    second = MuonAdamW(parameter_groups(parts))
    second.load_state_dict(first.state_dict())
    assert second.muon.param_groups[0] is second.param_groups[0]  # a schedule's changes reach it
    train(parts, second, 3, first=3)
    assert_equal(dict(whole.state_dict()), dict(parts.state_dict()))


def test_a_network_without_hidden_matrices_is_refused() -> None:
    with pytest.raises(UserError, match="no hidden matrix: use torch.optim.AdamW"):
        MuonAdamW(parameter_groups(Bigram(11, 3)))
