import numpy as np
import pytest

from lm.experiments import power_law


def test_a_law_is_found_again_and_predicts_the_next_size() -> None:
    sizes = [[n] for n in (1e5, 3e5, 1e6, 3e6, 1e7)]
    losses = [1.7 + 40 * n**-0.3 for (n,) in sizes]
    law = power_law.fit(sizes, losses)
    assert law.exponents[0] == pytest.approx(0.3, rel=0.05) and law.floor == pytest.approx(1.7, abs=0.02)
    assert law.at([3e7]) == pytest.approx(1.7 + 40 * 3e7**-0.3, rel=0.002)
    low, high = power_law.interval(sizes, losses, [3e7])
    assert low - 1e-3 <= 1.7 + 40 * 3e7**-0.3 <= high + 1e-3 and high - low < 0.02


def test_parameters_and_tokens_together() -> None:
    sizes = [[n, d] for n in (1e5, 1e6, 1e7) for d in (1e6, 1e7, 1e8)]
    losses = [1.5 + 30 * n**-0.3 + 60 * d**-0.28 for n, d in sizes]
    assert power_law.fit(sizes, losses).at([1e8, 1e9]) == pytest.approx(
        1.5 + 30 * 1e8**-0.3 + 60 * 1e9**-0.28, rel=0.01
    )


def test_a_loss_that_grows_has_no_negative_factor() -> None:
    law = power_law.fit([[10.0], [100.0], [1000.0]], [1.0, 2.0, 3.0])
    assert law.factors[0] >= 0 and law.at([1e9]) == pytest.approx(np.mean([1, 2, 3]), rel=0.01)


@pytest.mark.parametrize("sizes", [[[1.0], [2.0]], [[1.0], [1.0], [2.0]], [[1.0, 1.0]] * 5])
def test_too_few_runs(sizes: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="too few"):
        power_law.fit(sizes, [1.0] * len(sizes))
