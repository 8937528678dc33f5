import pytest
import torch

from lm.errors import UserError
from lm.models import GPT, MLP, Bigram, GatedWaveNet
from lm.training.optimizers import MuonAdamW, ScaledAdamW, parameter_groups
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


def wide(n_embd: int, base_width: int | None, init_std: float = 0.1) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": n_embd // 16, "n_embd": n_embd, "tie_weights": False}
    return GPT(11, 8, **sizes, base_width=base_width, init_std=init_std)


def growth(base_width: int | None, kind: str) -> float:
    """Return how much larger the change of the logits after five steps is at width 256 than at 64."""
    tokens = torch.arange(64).reshape(8, 8) % 11
    changes = []
    for n_embd in (64, 256):
        net = wide(n_embd, base_width)
        groups = parameter_groups(net)
        if kind == "muon":
            optimizer = MuonAdamW(groups, lr=1e-2, muon_lr=0.02)
        else:
            optimizer = (torch.optim.AdamW if base_width is None else ScaledAdamW)(groups, lr=1e-2)
        before = net(tokens).detach()
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.roll(1).flatten()).backward()
            optimizer.step()
        changes.append(float((net(tokens).detach() - before).std()))
    return changes[1] / changes[0]


def test_coordinates_change_alike_at_all_widths() -> None:
    assert 0.5 < growth(64, "adamw") < 1.6 and growth(None, "adamw") > 2
    assert 0.5 < growth(64, "muon") < 1.6


def test_rates_and_initial_weights_follow_the_width() -> None:
    net = wide(128, 32)
    optimizer = ScaledAdamW(parameter_groups(net), lr=0.4, weight_decay=0.1)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    found = {name: rates[id(p)] for name, p in net.named_parameters()}
    assert found["h.0.attn.c_attn.weight"] == found["lm_head.weight"] == (0.1, 0.4)
    assert found["wte.weight"] == found["wpe.weight"] == (0.4, 0.1) and found["ln_f.weight"] == (0.4, 0.0)
    std = {name: float(p.detach().std()) for name, p in net.named_parameters() if p.ndim == 2}
    assert std["h.0.attn.c_attn.weight"] == pytest.approx(0.05, rel=0.05)
    assert std["lm_head.weight"] == pytest.approx(0.025, rel=0.05) and std["wte.weight"] == pytest.approx(0.1, rel=0.05)
    assert_equal(dict(wide(64, 64).state_dict()), dict(wide(64, None).state_dict()))


def test_a_width_that_nothing_follows_is_refused() -> None:
    with pytest.raises(UserError, match="the network has no base_width"):
        ScaledAdamW(parameter_groups(net_of()))
    with pytest.raises(ValueError, match="base_width 8 needs tie_weights false"):
        GPT(11, 8, n_layer=1, n_head=2, n_embd=8, base_width=8)
