"""The learning rate's anchors: start, peak, middle, end; and the formulas of those whom recipes follow."""

import math
import re
from collections.abc import Callable
from itertools import chain
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.typed_yaml import find_recipe, load_recipe
from pipeline.recipe.pretrain import Optim, PretrainRecipe
from pipeline.train.schedule import learning_rate, steps_of_head_alone

CIFAR10, IMAGENET = 50_000, 1_281_167
Formula = Callable[[int, int], float]


def test_warm_up_is_linear_and_the_cosine_ends_at_the_final_rate() -> None:
    optim = Optim(name="larc", lr=4.8, warmup_steps=10, warmup_lr=0.3, final_lr=0.0048)
    rates = [learning_rate(optim, step=step, total_steps=110) for step in range(111)]
    assert rates[0] == pytest.approx(0.3)
    assert rates[5] == pytest.approx((0.3 + 4.8) / 2)
    assert rates[10] == pytest.approx(4.8)
    assert rates[35] == pytest.approx(0.0048 + (4.8 - 0.0048) * 0.8535533905932737)
    assert rates[60] == pytest.approx((4.8 + 0.0048) / 2)
    assert rates[110] == pytest.approx(0.0048)


def test_a_warm_up_may_reach_the_peak_with_its_last_step() -> None:
    optim = Optim(name="sgd", lr=0.4, warmup_steps=5, warmup_includes_peak=True)
    rates = [learning_rate(optim, step=step, total_steps=9) for step in range(7)]
    assert rates[:6] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates[6] < 0.4
    one = optim.model_copy(update={"warmup_steps": 1, "warmup_lr": 0.1})
    assert [learning_rate(one, step=step, total_steps=9) for step in (0, 1)] == [0.1, 0.4]


def test_a_cosine_of_the_run_is_joined_where_it_is() -> None:
    optim = Optim(name="larc", lr=1.0, warmup_steps=25, schedule="cosine_of_run")
    rates = [learning_rate(optim, step=step, total_steps=100) for step in range(101)]
    assert rates[24] == pytest.approx(24 / 25)
    assert rates[25] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)


def test_constant_stays_at_the_peak() -> None:
    optim = Optim(name="sgd", lr=0.1, schedule="constant", warmup_steps=4, final_lr=0.001)
    assert [learning_rate(optim, step=step, total_steps=9) for step in (0, 2, 4, 8, 90)] == [
        0.0,
        0.05,
        0.1,
        0.1,
        0.1,
    ]


def cosine(progress: float, peak: float, final: float = 0.0) -> float:
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))


def swav(step: int, total: int) -> float:
    """facebookresearch/swav, main_swav.py: np.linspace, then the cosine."""
    warmup = 10 * (IMAGENET // 4096)
    if step < warmup:
        return 0.3 + step * (4.8 - 0.3) / (warmup - 1)
    return cosine((step - warmup) / (total - warmup), 4.8, 0.0048)


def barlow_twins(step: int, total: int) -> float:
    """facebookresearch/barlowtwins, main.py, adjust_learning_rate."""
    warmup, base = 10 * (IMAGENET // 2048), 2048 / 256
    if step < warmup:
        return 0.2 * base * step / warmup
    q = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    return 0.2 * (base * q + base * 0.001 * (1 - q))


def byol(step: int, total: int, warmup: int = 10 * (IMAGENET // 4096)) -> float:
    """google-deepmind/deepmind-research, byol/utils/schedules.py."""
    scaled = 0.2 * 4096 / 256
    if step < warmup:
        return step / warmup * scaled
    return scaled * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def simsiam(step: int, total: int) -> float:
    """facebookresearch/simsiam, main_simsiam.py: of an epoch's first step."""
    return 0.05 * 512 / 256 * 0.5 * (1 + math.cos(math.pi * (step // (IMAGENET // 512)) / 100))


def solo_learn(peak: float, final: float = 0.0) -> Formula:
    """vturrisi/solo-learn, solo/utils/lr_scheduler.py, by step: the closed form."""

    def rate(step: int, total: int) -> float:
        warmup = 10 * (CIFAR10 // 256)
        if step < warmup:
            return 3e-5 + step * (peak - 3e-5) / (warmup - 1)
        return cosine((step - warmup) / (total - warmup), peak, final)

    return rate


def vissl(peak: float, start: float, warmup: int, *, constant: bool = False) -> Formula:
    """facebookresearch/vissl with ClassyVision's composite of [rescaled, fixed]: `where` is of the run."""

    def rate(step: int, total: int) -> float:
        where, length = step / total, warmup / total
        if where + 1e-6 <= length:
            rescaled = where / length
            return peak * rescaled + start * (1 - rescaled)
        return peak if constant else cosine(where, peak, peak * 0.0048 / 4.8)

    return rate


# By recipe: the formula, and every how manieth step it holds for.
FORMULAS: dict[str, tuple[Formula, int]] = {
    "swav_resnet50": (swav, 1),
    "barlow_twins_resnet50": (barlow_twins, 1),
    "barlow_twins_regnety_16gf": (barlow_twins, 1),
    "byol_resnet50": (byol, 1),
    "byol_regnety_16gf": (byol, 1),
    "simsiam_resnet50": (simsiam, IMAGENET // 512),
    "simsiam_regnety_16gf": (simsiam, IMAGENET // 512),
    "cifar10_swav": (solo_learn(0.6, 0.0006), 1),
    "cifar10_barlow_twins": (solo_learn(0.3), 1),
    "cifar10_byol": (solo_learn(1.0), 1),
    "cifar10_simsiam": (solo_learn(0.5), 1),
    "seer_regnety_8gf": (vissl(4.8, 0.3, 8000), 1),
    "seer_regnety_16gf": (vissl(4.8, 0.3, 8000), 1),
    "seer_regnety_32gf": (vissl(4.8, 0.3, 8000), 1),
    "seer_regnety_64gf": (vissl(4.8, 0.3, 8000), 1),
    "seer_regnety_128gf": (vissl(4.8, 0.3, 8000, constant=True), 1),
    "seer_regnety_256gf": (vissl(9.6, 0.15, 8000), 1),
    "seer_regnet_10b": (vissl(9.3, 0.15, 5500), 1),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_recipe_follows_the_formula_of_its_source(name: str) -> None:
    """Within 1e-12, at every step near where the schedule bends, and at a share of the others."""
    formula, every = FORMULAS[name]
    recipe = load_recipe(PretrainRecipe, name, kind="pretrain")
    images = CIFAR10 if name.startswith("cifar10") else IMAGENET
    total = recipe.train.steps or (recipe.train.epochs or 0) * (images // recipe.data.batch_size)
    bend = recipe.optim.warmup_steps
    near = (range(max(0, end - 500), min(end + 500, total)) for end in (0, bend, total))
    for step in chain(range(0, total, 89 if every == 1 else every), *(near if every == 1 else ())):
        ours = learning_rate(recipe.optim, step=step, total_steps=total)
        assert abs(ours - formula(step, total)) < 1e-12, step


# By recipe: videos of the first split, visits of each in an epoch there, epochs with the classifier alone,
# epochs with all, and the milestones among those (AVID-CMA, eval-action-recg.py and configs/benchmark).
FINE_TUNING = {
    "finetune_ucf101": (9537, 10, 5, 16, (6, 10, 14)),
    "finetune_hmdb51": (3570, 25, 5, 10, (3, 6, 8)),
}


@pytest.mark.parametrize("name", FINE_TUNING)
def test_a_fine_tuning_has_the_steps_of_its_source(name: str) -> None:
    videos, visits, alone, together, milestones = FINE_TUNING[name]
    recipe = load_recipe(PretrainRecipe, name, kind="transfer")
    optim, epoch = recipe.optim, videos // recipe.data.batch_size
    total = (recipe.train.epochs or 0) * epoch
    assert total == (alone + together) * visits * epoch
    assert steps_of_head_alone(optim, total_steps=total) == alone * visits * epoch
    for step in range(total):
        passed = sum(step >= (alone + milestone) * visits * epoch for milestone in milestones)
        assert learning_rate(optim, step=step, total_steps=total) == 1e-4 * 0.3**passed, step


def test_byol_has_its_authors_number_of_steps_as_its_header_says() -> None:
    path = find_recipe("byol_resnet50", kind="pretrain")
    header = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line[0] == "#")
    overrides = re.findall(r"train\.epochs=null|train\.steps=\d+|optim\.warmup_steps=\d+", header)
    recipe = load_recipe(PretrainRecipe, "byol_resnet50", overrides, kind="pretrain")
    total, warmup = 1000 * IMAGENET // 4096, 10 * IMAGENET // 4096  # byol/configs/byol.py
    assert (recipe.train.steps, recipe.optim.warmup_steps) == (total, warmup)
    for step in range(0, total, 997):
        ours = learning_rate(recipe.optim, step=step, total_steps=total)
        assert abs(ours - byol(step, total, warmup)) < 1e-12


@given(
    warmup=st.integers(0, 50),
    total=st.integers(1, 100),
    step=st.integers(0, 200),
    final=st.floats(0, 1),
    includes_peak=st.booleans(),
    schedule=st.sampled_from(("cosine", "cosine_of_run")),
)
def test_the_rate_stays_between_its_ends(
    warmup: int,
    total: int,
    step: int,
    final: float,
    includes_peak: bool,
    schedule: Literal["cosine", "cosine_of_run"],
) -> None:
    optim = Optim(
        name="larc",
        lr=1.0,
        warmup_steps=warmup,
        final_lr=final,
        warmup_includes_peak=includes_peak,
        schedule=schedule,
    )
    rate = learning_rate(optim, step=step, total_steps=total)
    assert 0 <= rate <= 1
    if step >= warmup and total > warmup:
        assert rate >= final - 1e-12
        assert learning_rate(optim, step=step + 1, total_steps=total) <= rate
