import math
import re
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter

from lm.cli.fit import Fit
from lm.errors import UserError
from lm.models import MLP
from lm.training.callbacks.figures import Figures, _histogram
from tests.conftest import RECIPE

EVERY = ["--figures.every_n_steps", "4", "--trainer.log_every_n_steps", "4"]


def fit(*arguments: object) -> Fit:
    cli = Fit(["--config", "tiny.yaml", *map(str, arguments)], "")
    cli.run()
    return cli


def tags(run: str = "tiny") -> dict[str, list[int]]:
    """The steps of each tag in the event files."""
    found = defaultdict(list)
    for path in sorted((Path("logs") / run).glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found[value.tag].append(event.step)
    return dict(found)


@pytest.fixture
def mlp(workplace: Path) -> Path:
    """The tiny recipe with an MLP on lines."""
    recipe = yaml.safe_load(yaml.safe_dump(RECIPE))
    recipe["model"]["init_args"]["net"] = {"class_path": "lm.models.MLP", "init_args": {"n_hidden": 8}}
    recipe["data"] = {
        "class_path": "lm.data.LinesData",
        "init_args": {"corpus": "text.txt", "end": "|", "block_size": 4, "batch_size": 8},
    }
    (workplace / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return workplace


def test_a_gpts_figures(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(*EVERY)
    found = tags()
    steps = [1, 4, 8, 12]
    assert found["activations/h.0.attn.c_attn"] == found["gradients/wte.weight"] == steps
    assert found["update_ratio/h.0.mlp.c_fc.weight"] == steps
    assert found["attention/block_0"] == [4, 8, 12]
    assert not [tag for tag in found if tag.startswith("saturation")]
    projector = next(Path("logs/tiny").glob("**/metadata.tsv"))
    labels = projector.read_text().splitlines()
    assert Fit(["--config", "tiny.yaml", "--ckpt_path", "last"], "").run()["step"] == 12
    assert "exists" not in capsys.readouterr().out
    assert "'x'" in labels and "'\\n'" in labels


def test_train_and_validation_loss_are_in_one_chart_at_the_top(workplace: Path) -> None:
    fit(*EVERY)
    layouts = []
    for path in Path("logs/tiny").glob("events*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == "custom_scalars__config__":
                    layouts.append(Layout.FromString(value.tensor.string_val[0]))
    charts = [chart for category in layouts[0].category for chart in category.chart]
    assert len(layouts) == 1 and charts[0].title == "loss"
    assert list(charts[0].multiline.tag) == ["train/loss$", "val/loss$"]
    found = tags()
    assert found["train/loss"] and found["val/loss"]
    shares = next(chart.multiline.tag[0] for chart in charts if "residual" in chart.title)
    assert re.fullmatch(shares, "residual_share/h.0.attn")


def test_a_dead_neuron_is_seen(workplace: Path) -> None:
    """A ReLU unit that no example switches on, and a tanh unit that every one drives to its end."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4), torch.nn.Tanh())
    with torch.no_grad():
        net[0].bias[1], net[2].bias[2] = -1e3, 1e3
    figures = Figures()
    figures.before_step(net)
    net(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)))
    dead = {name: stuck.all(0).nonzero().flatten().tolist() for name, stuck in figures._stuck.items()}
    assert dead == {"1": [1], "3": [2]}
    with SummaryWriter("logs/dead") as board:
        figures._loggers = [Namespace(experiment=board)]
        figures.after_step(net, 1)
    assert tags("dead")["dead_units/1"] == [1, 1]  # the number, and the picture


def test_an_mlps_figures_with_many_steps_in_a_call(mlp: Path) -> None:
    fit(*EVERY, "--name", "one")
    fit(*EVERY, "--name", "many", "--model.init_args.steps_per_call", 4, "--checkpoint.every_n_steps", 4)
    one, many = tags("one"), tags("many")
    assert one["saturation/hidden.2"] == one["activations/hidden.1"] == [1, 4, 8, 12]
    assert one == many


@pytest.mark.parametrize("name", ["activations", "gradients", "saturation", "updates", "attention", "embedding"])
def test_each_can_be_switched_off(mlp: Path, name: str) -> None:
    kinds = {"updates": "update_ratio"}.get(name, name)
    fit(*EVERY, f"--figures.{name}", "false")
    assert not [tag for tag in tags() if tag.startswith(kinds)]
    assert bool(list(Path("logs/tiny").glob("**/metadata.tsv"))) == (name != "embedding")


def test_zero_switches_all_off(workplace: Path) -> None:
    cli = fit("--figures.every_n_steps", 0)
    prefixes = {tag.split("/")[0] for tag in tags()}
    assert prefixes <= {"train", "val", "sample"}
    assert not any(module._forward_hooks for module in cli.model.net.modules())
    with pytest.raises(UserError, match="figures.every_n_steps is -1"):
        Figures(every_n_steps=-1)


def test_figures_change_no_bit_and_leave_no_hook(workplace: Path) -> None:
    with_figures = fit("--figures.every_n_steps", 1, "--name", "with")
    without = fit("--figures.every_n_steps", 0, "--name", "without")
    for a, b in zip(with_figures.model.net.parameters(), without.model.net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(module._forward_hooks for module in with_figures.model.net.modules())


class Board:
    """Keeps the scalars it is given."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag] = value

    def add_histogram(self, *arguments: object) -> None:
        pass

    def add_image(self, *arguments: object, dataformats: str) -> None:
        pass


@pytest.mark.parametrize(("scale", "share"), [(1000.0, 1.0), (0.0, 0.0)])
def test_ratios_and_shares_are_the_formulas(scale: float, share: float) -> None:
    torch.manual_seed(0)
    net = MLP(5, 3, n_hidden=200, batch_norm=False)
    net.hidden[0].weight.data *= scale
    figures, board = Figures(), Board()
    figures._loggers = [Namespace(experiment=board)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.25)
    head = net.lm_head.weight.detach().clone()
    figures.before_step(net)
    net(torch.randint(5, (64, 3))).logsumexp(1).sum().backward()
    figures.before_update(net)
    optimizer.step()
    figures.after_step(net, 1)
    assert board.scalars["saturation/hidden.1"] == pytest.approx(share, abs=0.02)
    if scale:
        expected = math.log10(0.25 * float(net.lm_head.weight.grad.std() / head.std()))
        assert board.scalars["update_ratio/lm_head.weight"] == pytest.approx(expected, rel=1e-4)


def test_values_beyond_tensorboards_bins_end_no_training(workplace: Path) -> None:
    with SummaryWriter("logs/loud") as board:
        _histogram(board, "all", torch.tensor([1e37, -2e37, 3e30]), 1)
        _histogram(board, "some", torch.tensor([math.inf, math.nan, 1.0, 2.0]), 1)
        _histogram(board, "none", torch.tensor([math.inf, 1.0]), 1)
    assert tags("loud").keys() == {"all", "some"}


def test_an_output_is_shown_as_it_was_before_a_change_in_place() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(inplace=True))
    figures = Figures()
    figures.before_step(net)
    net(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)))
    assert figures._seen["0"].min() < 0 <= figures._seen["1"].min()
