import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from lm.cli.fit import Fit
from lm.data import TextData
from lm.errors import UserError
from lm.generation import load_network
from lm.models import Bigram
from lm.training import LanguageModel, ManualLanguageModel
from lm.training.callbacks import process
from lm.training.loggers.log_files import read_csv
from lm.training.metrics import TokenLoss

EXACT = ["--trainer.precision", "64-true", "--model.init_args.net.init_args.dropout", "0"]


def fit(*arguments: object) -> Fit:
    """Train the tiny recipe here."""
    cli = Fit(["--config", "tiny.yaml", *map(str, arguments)], "")
    cli.run()
    return cli


def weights(run: str) -> dict[str, torch.Tensor]:
    return torch.load(f"checkpoints/{run}/last.ckpt", weights_only=True)["state_dict"]


def test_decay_is_for_matrices_and_every_parameter_has_a_group(workplace: Path) -> None:
    cli = fit("--trainer.max_steps", 1)
    decayed, plain = cli.trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    grouped = {id(p) for p in (*decayed["params"], *plain["params"])}
    assert grouped == {id(p) for p in cli.model.net.parameters()}


def test_learning_rate_is_the_schedule_times_the_groups_own(workplace: Path) -> None:
    cli = fit()
    logged = {int(row["step"]): float(row["train/learning_rate"]) for row in read_csv(cli.logs / "metrics.csv")[1]}
    assert logged == pytest.approx({step: 1e-3 * cli.model.step.schedule(step - 1, 12) for step in range(1, 13)})


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_micro_batches_equal_the_whole_batch(workplace: Path, accumulate: int) -> None:
    fit("--name", "whole", *EXACT)
    fit("--name", "parts", "--trainer.accumulate_grad_batches", accumulate, *EXACT)
    for name, value in weights("whole").items():
        torch.testing.assert_close(weights("parts")[name], value, rtol=1e-9, atol=1e-12)
    rows = [read_csv(Path(f"logs/{run}/metrics.csv"))[1] for run in ("whole", "parts")]
    for name in ("step", "train/loss", "train/gradient_norm", "train/tokens", "val/loss"):
        whole, parts = ([float(row[name]) for row in table if row[name]] for table in rows)
        assert parts == pytest.approx(whole, rel=1e-9)
        assert len(whole) >= 3


def test_clipping_scales_the_gradient_to_the_norm(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.Optimizer, closure=None):
        loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        original(self)
        return loss

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    cli = fit("--model.init_args.clip_norm", 0.01, *EXACT)
    assert norms == pytest.approx([0.01] * 12, rel=1e-4)
    rows = read_csv(cli.logs / "metrics.csv")[1]
    assert all(float(row["train/gradient_norm"]) > 0.1 for row in rows)  # logged before it is clipped


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_weights_are_touched(lm, workplace: Path, poison: str, monkeypatch) -> None:
    step_of = LanguageModel.training_step

    def training_step(self, batch, batch_idx):
        loss = step_of(self, batch, batch_idx)
        if self.global_step == 7:
            if poison == "loss":
                self.step.losses[-1] = torch.tensor(math.nan)
                return loss * math.nan
            self.net.wpe.weight.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(LanguageModel, "training_step", training_step)
    code, _, err = lm("fit", "--config", "tiny.yaml", "--name", "bad")
    assert code == 1
    assert err.startswith("error: step 8: loss ") and "not finite" in err
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("LM_DATA_HOME", str(workplace / "data"))
    good = Fit(["--config", "tiny.yaml", "--name", "seven", "--checkpoint.every_n_steps", "7"], "")
    good.run()
    expected = torch.load("checkpoints/seven/step=0000007.ckpt", weights_only=True)
    saved = torch.load("checkpoints/bad/last.ckpt", weights_only=True)
    assert saved["global_step"] == 7
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in expected["state_dict"].items())


def test_evaluation_is_the_sum_over_all_tokens(lm, workplace: Path) -> None:
    lm("fit", "--config", "tiny.yaml", *EXACT)
    fitted = load_network(Path("checkpoints/tiny/last.ckpt"))
    data = TextData(corpus="text.txt", block_size=16, batch_size=4)
    data.setup("fit")
    nats = tokens = size = 0.0
    with torch.no_grad():
        for x, y in data.val_dataloader():
            nats += float(F.cross_entropy(fitted.net.double()(x).flatten(0, 1), y.flatten(), reduction="sum"))
            tokens += y.numel()
            size += len(data.text_tokenizer.decode_bytes(y.flatten().tolist()))
    _, out, _ = lm("validate", "--ckpt_path", "checkpoints/tiny/last.ckpt", "--json")
    result = yaml.safe_load(out.splitlines()[-1])
    assert result == {
        "loss": pytest.approx(nats / tokens, rel=1e-9),
        "perplexity": pytest.approx(math.exp(nats / tokens), rel=1e-9),
        "bits_per_byte": pytest.approx(nats / math.log(2) / size, rel=1e-9),
        "tokens": tokens,
        "step": 12,
    }


def test_token_loss_weighs_tokens_not_batches() -> None:
    metric = TokenLoss()
    metric.update(torch.tensor(10.0), 10, 20)
    metric.update(torch.tensor(90.0), 30, 30)
    values = metric.compute()
    assert float(values["loss"]) == pytest.approx(2.5, rel=1e-12)
    assert float(values["bits_per_byte"]) == pytest.approx(2 / math.log(2), rel=1e-12)
    assert int(values["tokens"]) == 40


def test_the_trainers_own_clipping_is_honoured(workplace: Path) -> None:
    fit("--name", "ours", "--model.init_args.clip_norm", 0.05)
    fit("--name", "trainers", "--model.init_args.clip_norm", "null", "--trainer.gradient_clip_val", 0.05)
    assert all(torch.equal(weights("trainers")[name], value) for name, value in weights("ours").items())


def test_the_heap_is_frozen_in_training_and_free_after_it(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = []
    step_of = LanguageModel.training_step

    def training_step(self, batch, batch_idx):
        frozen.append(gc.get_freeze_count())
        if len(frozen) == 14:
            raise UserError("stop here")
        return step_of(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", training_step)
    monkeypatch.setattr(process, "gc", gc)  # not the quick one of tests/conftest.py
    gc.unfreeze()
    assert lm("fit", "--config", "tiny.yaml")[0] == 0
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0
    assert lm("fit", "--config", "tiny.yaml", "--name", "stopped")[0] == 2
    assert gc.get_freeze_count() == 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_trainer_of_ones_own_goes_on_from_its_checkpoint(workplace: Path) -> None:
    def fit(steps: int, ckpt_path: str | None = None) -> Trainer:
        keeper = ModelCheckpoint(dirpath="kept", save_last=True, every_n_train_steps=2)
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", devices=1, logger=False, callbacks=[keeper],
            enable_progress_bar=False, enable_model_summary=False, check_val_every_n_epoch=None, val_check_interval=2,
        )  # fmt: skip
        data = TextData(corpus="text.txt", block_size=8, batch_size=4)
        trainer.fit(LanguageModel(net=Bigram), datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    fit(2)
    assert fit(4, "kept/last.ckpt").global_step == 4


def test_a_trainer_of_ones_own_accumulates_and_clips_by_hand_too(workplace: Path) -> None:
    def fit(kind: type[LanguageModel], **settings: Any) -> torch.Tensor:
        torch.manual_seed(1)
        trainer = Trainer(
            max_steps=4, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, precision="64-true",
            enable_progress_bar=False, enable_model_summary=False, **settings,
        )  # fmt: skip
        module = kind(net=Bigram, clip_norm=None)
        trainer.fit(module, datamodule=TextData(corpus="text.txt", block_size=8, batch_size=4))
        assert module.net is not None and trainer.global_step == 4
        return torch.cat([p.detach().flatten() for p in module.net.parameters()])

    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3}
    by_graph, by_hand = (fit(kind, **settings) for kind in (LanguageModel, ManualLanguageModel))
    torch.testing.assert_close(by_hand, by_graph, rtol=1e-9, atol=0)
    torch.testing.assert_close(fit(ManualLanguageModel, gradient_clip_val=1e-3), by_graph, rtol=1e-9, atol=0)
    assert not torch.equal(fit(ManualLanguageModel), by_graph)


@pytest.mark.parametrize("kind", [LanguageModel, ManualLanguageModel])
def test_a_trainer_of_ones_own_evaluates_and_refuses(workplace: Path, kind: type[LanguageModel]) -> None:
    def trainer(**settings: Any) -> Trainer:
        return Trainer(
            max_steps=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, **settings,
        )  # fmt: skip

    module, data = kind(net=Bigram), TextData(corpus="text.txt", block_size=8, batch_size=4, test_fraction=0.2)
    trainer().fit(module, datamodule=data)
    (found,) = trainer().validate(module, datamodule=data, verbose=False)
    assert found == pytest.approx({f"val_{k}": v for k, v in module.validation.items() if k not in ("step", "tokens")})
    (found,) = trainer().test(module, datamodule=data, verbose=False)
    assert set(found) == {"test_loss", "test_perplexity", "test_bits_per_byte"} and found["test_loss"] > 0
    with pytest.raises(UserError, match="trainer.overfit_batches is 2: training has no epochs"):
        trainer(overfit_batches=2).fit(kind(net=Bigram), datamodule=data)
