from pathlib import Path

import pytest
import torch

from lm.data import TextData
from lm.errors import UserError

ARGUMENTS = {"corpus": "text.txt", "block_size": 16, "batch_size": 6}


def batches(data: TextData, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data.setup("fit")
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(count)]


def test_workers_change_nothing(workplace: Path) -> None:
    here, there = (batches(TextData(**ARGUMENTS, num_workers=n), 5) for n in (0, 2))
    for (tokens, targets), (same_tokens, same_targets) in zip(here, there, strict=True):
        assert torch.equal(tokens, same_tokens)
        assert torch.equal(targets, same_targets)
        assert tokens.shape == (6, 16)


def test_loaders_leave_the_global_random_numbers_alone(workplace: Path) -> None:
    data = TextData(**ARGUMENTS)
    data.setup("fit")
    before = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_covers_its_split_once(workplace: Path) -> None:
    data = TextData(**ARGUMENTS)
    data.setup("fit")
    targets = torch.cat([y.flatten() for _, y in data.val_dataloader()])
    assert targets.tolist() == data.corpora[0].splits["val"][1:].tolist()


def test_a_test_split_is_the_end_of_the_text(workplace: Path) -> None:
    data = TextData(**ARGUMENTS, test_fraction=0.2)
    data.setup("test")
    text = (workplace / "text.txt").read_text()
    targets = torch.cat([y.flatten() for _, y in data.test_dataloader()])
    assert text.endswith(data.text_tokenizer.decode(targets.tolist()))
    assert len(targets) == len(text) - int(len(text) * 0.8) - 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_size": 0}, "data.block_size is 0"),
        ({"batch_size": -1}, "data.batch_size is -1"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"val_fraction": 0.0}, "data.val_fraction is 0: it must be above 0"),
        ({"val_fraction": 0.7, "test_fraction": 0.3}, "leave nothing to train on"),
        ({"block_size": 5000}, r"val split has \d+ tokens, block_size 5000 needs 5001"),
        ({"corpus": "nowhere.txt"}, "corpus nowhere.txt: no such file or folder"),
        ({"tokenizer": "words"}, "tokenizer words: neither char, byte, gpt2, cl100k_base, o200k_base nor"),
        ({"num_workers": 10**9}, r"/dev/shm has \d+ MiB free"),
    ],
)
def test_bad_settings_are_refused(workplace: Path, changed: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        batches(TextData(**(ARGUMENTS | changed)), 1)
