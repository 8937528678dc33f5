"""`lm inspect`: layers, a batch, a text, for every kind of network."""

import json
from pathlib import Path

import pytest
import yaml

from lm.data import LinesData
from lm.models import MLP, GatedWaveNet
from tests.support.cases import often
from tests.support.networks import NETWORKS, recipe


@pytest.mark.parametrize("name", often(NETWORKS, lambda name: name in ("MLP", "Seq2Seq")))
def test_every_network(lm, workplace: Path, name: str) -> None:
    recipe(name)
    code, out, err = lm("inspect", "--config", "net.yaml", "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["parameters"] == sum(layer["parameters"] for layer in result["layers"])
    assert result["flops_per_token"] > 0 and 1 <= len(result["batch"]) <= 8
    assert result["layers"][-1]["name"] == "lm_head"


def test_layers_and_a_batch_are_the_networks_and_the_datas(lm, workplace: Path) -> None:
    recipe("MLP")
    code, out, err = lm("inspect", "--config", "net.yaml", "--json", "--text", "héllo")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    net = MLP(27, 8, n_hidden=16, n_layer=2)
    assert result["parameters"] == sum(p.numel() for p in net.parameters())
    shapes = {layer["name"]: layer["shape"] for layer in result["layers"]}
    assert shapes["wte"] == [8, 8, 10] and shapes["hidden.1"] == [8, 16] and shapes["lm_head"] == [8, 27]
    data = LinesData(**yaml.safe_load(Path("net.yaml").read_text())["data"]["init_args"], seed=1337)
    data.setup("fit")
    tokens, targets = data.train_dataset(1)[0]
    assert [one["context"] for one in result["batch"]] == tokens.tolist()
    assert [one["target"] for one in result["batch"]] == targets.tolist()
    assert f"in the context {' '.join(map(str, tokens[0].tolist()))} the target is {int(targets[0])}" in err
    by = {row["tokenizer"]: row for row in result["text"]}
    assert by["byte"]["ids"] == list("héllo".encode()) and "é" in by["the recipe's"]["error"]


def test_a_chunk_of_nine_is_eight_examples(lm, workplace: Path) -> None:
    recipe("GatedWaveNet")
    code, out, err = lm("inspect", "--config", "net.yaml", "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert [len(one["context"]) for one in result["batch"]] == list(range(1, 1 + len(result["batch"])))
    for shorter, longer in zip(result["batch"], result["batch"][1:], strict=False):
        assert longer["context"] == [*shorter["context"], shorter["target"]]
    assert result["parameters"] == sum(p.numel() for p in GatedWaveNet(27, 8, n_embd=8).parameters())


def test_pictures_are_files(lm, workplace: Path) -> None:
    recipe("MLP")
    code, out, err = lm("inspect", "--config", "net.yaml", "--figures", "pictures", "--json")
    assert code == 0, err
    paths = [Path(path) for path in json.loads(out.splitlines()[-1])["figures"]]
    assert {"dlogits", "updates"} <= {path.stem for path in paths}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    for name in ("words.txt", "words.txt/more"):
        code, _, err = lm("inspect", "--config", "net.yaml", "--figures", name)
        assert code == 2 and err == f"error: --figures {name}: words.txt is a file: name a folder\n", err
