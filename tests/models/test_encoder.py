import pytest
import torch

from lm.models import Encoder


def made(**settings) -> Encoder:
    torch.manual_seed(1)
    net = Encoder(9, 12, n_layer=2, n_head=2, n_embd=8, **settings).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


def test_padding_changes_nothing_and_order_does() -> None:
    net, text = made(), torch.tensor([[3, 5, 7, 4]])
    padded = torch.tensor([[3, 5, 7, 4, 0, 0, 0]])
    torch.testing.assert_close(net(padded), net(text), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(net(text.flip(1)), net(text))
    assert not torch.allclose(made(pad_token=None)(padded), made(pad_token=None)(text))


def test_each_token_is_read_by_all() -> None:
    """The first token's output depends on the last: there is no causal mask."""
    net = made()
    e = net.wte(torch.tensor([[3, 5, 7, 4]])).detach().requires_grad_()
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    net.h[0](e, mask)[0, 0].sum().backward()
    assert (e.grad[0].abs().sum(1) > 0).all()


def test_a_row_without_text_is_finite() -> None:
    assert made()(torch.zeros(2, 5, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize(("settings", "message"), [({"pad_token": 9}, "pad_token is 9"), ({"n_head": 3}, "n_head")])
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(9, 12, **{"n_embd": 8, "n_head": 2, **settings})
