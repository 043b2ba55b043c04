"""The learning rate's anchors: start, peak, middle, end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.recipe.pretrain import Optim
from pipeline.train.schedule import learning_rate


def test_warm_up_is_linear_and_the_cosine_ends_at_the_final_rate() -> None:
    optim = Optim(name="larc", lr=4.8, warmup_steps=10, warmup_lr=0.3, final_lr=0.0048)
    rates = [learning_rate(optim, step=step, total_steps=110) for step in range(111)]
    assert rates[0] == pytest.approx(0.3)
    assert rates[5] == pytest.approx((0.3 + 4.8) / 2)
    assert rates[10] == pytest.approx(4.8)
    assert rates[35] == pytest.approx(0.0048 + (4.8 - 0.0048) * 0.8535533905932737)
    assert rates[60] == pytest.approx((4.8 + 0.0048) / 2)
    assert rates[110] == pytest.approx(0.0048)


def test_constant_stays_at_the_peak() -> None:
    optim = Optim(name="sgd", lr=0.1, schedule="constant", warmup_steps=4, final_lr=0.001)
    assert [learning_rate(optim, step=step, total_steps=9) for step in (0, 2, 4, 8, 90)] == [
        0.0,
        0.05,
        0.1,
        0.1,
        0.1,
    ]


@given(warmup=st.integers(0, 50), total=st.integers(1, 100), step=st.integers(0, 200), final=st.floats(0, 1))
def test_the_rate_stays_between_its_ends(warmup: int, total: int, step: int, final: float) -> None:
    optim = Optim(name="larc", lr=1.0, warmup_steps=warmup, final_lr=final)
    rate = learning_rate(optim, step=step, total_steps=total)
    assert 0 <= rate <= 1
    if step >= warmup and total > warmup:
        assert rate >= final - 1e-12
        assert learning_rate(optim, step=step + 1, total_steps=total) <= rate
