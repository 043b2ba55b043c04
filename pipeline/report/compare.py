"""Runs side by side: what differs between their recipes, how they went, and which of them collapsed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cluster.errors import UserError
from cluster.typed_yaml import load_recipe
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.stages import CompareRecipe
from pipeline.report.curve import Curve, numbered_rows, thinning
from pipeline.report.figures import TONES, Series, line_chart
from pipeline.report.page import environment
from pipeline.train.branch import Parent, read_parent
from pipeline.train.collapse import COLLAPSED_BELOW, signs_of_collapse

# Key in metrics.jsonl, title, unit, meaning.
PANELS = (
    ("loss", "Loss", "", "of the whole batch; those of different methods are different numbers"),
    ("lr", "Learning rate", "", "warm-up, then the schedule"),
    ("embedding_std", "Embedding spread", "", "1 on the whole sphere; 0 where all images are one point"),
    ("rankme", "RankMe", "", "effective number of dimensions that the embedding uses"),
    ("knn", "Nearest-neighbour accuracy", " %", "of the trunk, by the labels of the recipe's probe"),
)
_LONGEST_VALUE = 60  # characters
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A number that fell below its threshold, and the step where it first did."""

    name: str
    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run among others.

    Attributes:
        differs: dotted key of the recipe → value, of the keys that are not the same in all runs.
        last: metric → its last value, and the step that the run has come to.
        collapse: what is a sign of collapse, if anything.
        curves: metric → its values over the steps, of the metrics of PANELS; of a branch from where it left.
        branch: where that was, for people; "" of a run that began at the start.
    """

    name: str
    folder: str
    differs: dict[str, Any]
    last: dict[str, Any]
    collapse: list[Sign]
    curves: dict[str, Curve]
    branch: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the curves."""
        return {key: value for key, value in asdict(replace(self, curves={})).items() if key != "curves"}

    def differs_in(self) -> list[str]:
        """What differs, for people: "method.stop_gradient=false"."""
        return [f"{key}={_text(value)}" for key, value in self.differs.items()]


def compare_runs(folders: Mapping[str, Path]) -> list[ComparedRun]:
    """Read runs that have ended, or still go on.

    Args:
        folders: a run's name → its folder.

    Raises:
        UserError: if there are too few or too many, or one is not a run or has recorded nothing.
    """
    if not 2 <= len(folders) <= len(TONES):
        raise UserError(
            f"there {'is 1 run' if len(folders) == 1 else f'are {len(folders)} runs'} to compare: "
            f"name two at least, and {len(TONES)} at most"
        )
    recipes = {name: _recipe(folder) for name, folder in folders.items()}
    runs = [_read_run(name, folders[name], recipe) for name, recipe in recipes.items()]
    differ = what_differs([recipe.model_dump(mode="json", exclude={"run"}) for recipe in recipes.values()])
    return [
        replace(
            run,
            differs={key: values[index] for key, values in differ.items() if values[index] is not _ABSENT},
        )
        for index, run in enumerate(runs)
    ]


def what_differs(trees: Sequence[Any], key: str = "") -> dict[str, Sequence[Any]]:
    """Dotted key → its value in each of some trees of plain values, where these are not all the same.

    What one method has and another has not is no difference of its own: `method.name` says it.
    """
    compared = [value for value in trees if value is not _ABSENT or not key.startswith("method.")]
    if all(value == compared[0] for value in compared):
        return {}
    parts = [_parts(value) for value in trees]
    if not all(parts):
        return {key: trees}
    found: dict[str, Sequence[Any]] = {}
    for name in dict.fromkeys(name for each in parts for name in each):
        below = [each.get(name, _ABSENT) for each in parts]
        found |= what_differs(below, f"{key}.{name}" if key else name)
    return found


def comparison_page(runs: Sequence[ComparedRun], recipe: CompareRecipe) -> str:
    """One HTML page that needs nothing else: the runs in a table and, over their steps, in a figure."""
    return (
        environment()
        .get_template("compare.html")
        .render(
            title=recipe.title,
            runs=list(zip(TONES, runs, strict=False)),
            panels=[
                {
                    "title": title,
                    "meaning": _meaning(runs, key, meaning),
                    "chart": _chart(runs, key, title, unit),
                }
                for key, title, unit, meaning in PANELS
            ],
            probed=any(run.curves["knn"].points for run in runs),
        )
    )


def _chart(runs: Sequence[ComparedRun], key: str, title: str, unit: str) -> Markup:
    series = []
    for tone, run in zip(TONES, runs, strict=False):
        steps, values = run.curves[key].drawn
        series.append(Series(name=run.name, x=steps, y=values, tone=tone))
    return line_chart(
        series,
        title=title,
        x_label="step",
        unit=unit,
        floor=COLLAPSED_BELOW.get(key),
        doubling=key == "rankme",  # from tens down to 1: what matters is at the low end
    )


def _meaning(runs: Sequence[ComparedRun], key: str, meaning: str) -> str:
    if key in COLLAPSED_BELOW:
        meaning = f"{meaning}; below {COLLAPSED_BELOW[key]:g}, dotted, it has collapsed"
    return meaning + thinning([run.curves[key] for run in runs])


def _read_run(name: str, folder: Path, recipe: PretrainRecipe) -> ComparedRun:
    """What a run has recorded, without the values that were not finite; in what it differs is not known yet.

    Signs of collapse count as the run itself warns of them: not before the end of its warm-up.
    """
    path = folder / "metrics.jsonl"
    last: dict[str, Any] = {}
    collapse: dict[str, Sign] = {}
    curves = {key: Curve() for key, *_ in PANELS}
    parent = read_parent(folder)
    for key, point in _where_it_left(parent).items() if parent else ():
        curves[key].add(*point)
    for step, values in numbered_rows(path):
        last |= values
        for sign in signs_of_collapse(values) if step > recipe.optim.warmup_steps else ():
            collapse.setdefault(sign, Sign(name=sign, step=step, value=values[sign]))
        for key, curve in curves.items():
            if key in values:
                curve.add(step, values[key])
    if "loss" not in last:
        raise UserError(f"{folder} has no metrics yet: it writes them every run.log_every steps")
    return ComparedRun(
        name=name,
        folder=str(folder),
        differs={},
        last=last,
        collapse=list(collapse.values()),
        curves=curves,
        branch=f"{Path(parent.run).name}, step {parent.step}" if parent else "",
    )


def _where_it_left(parent: Parent) -> dict[str, tuple[int, float]]:
    """metric → the last step of a branch's parent, and the value there, before they part; nothing if the
    parent is not there any more.
    """
    path = Path(parent.run) / "metrics.jsonl"
    found: dict[str, tuple[int, float]] = {}
    for step, values in numbered_rows(path):
        if step > parent.step:
            break
        found |= {key: (step, values[key]) for key, *_ in PANELS if key in values}
    return found


def _recipe(folder: Path) -> PretrainRecipe:
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not a run of pretraining: it has no recipe.yaml")
    return load_recipe(PretrainRecipe, str(path), kind="pretrain")


def _parts(value: Any) -> dict[str, Any]:
    """What a section, or a list of sections, holds; nothing for a plain value."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(index): item for index, item in enumerate(value)}
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"
