"""What a training records over its steps, as charts: for every page, what a number is called and means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from pipeline.report.curve import Curve, read_curves, thinning
from pipeline.report.figures import Series, line_chart

# File of a run, key of its rows → title, meaning.
MEASURED = {
    "metrics.jsonl": {
        "loss": ("Loss", "of the whole batch; SwAV's starts at the logarithm of its prototypes"),
        "knn": ("Nearest-neighbour accuracy", "percent, measured while training; it steers nothing"),
        "train_top1": ("Training accuracy", "share of the batch that is told right"),
        "lr": ("Learning rate", "warm-up, then the schedule"),
        "grad_norm": ("Gradient norm", "before it is clipped, where it is"),
        "invariance": ("Invariance", "how far the components of the two views are from agreeing"),
        "redundancy": ("Redundancy", "how much the components of the embedding repeat each other"),
        "prototype_entropy": ("Prototype entropy", "a fall to 0 would be a collapse"),
        "assignment_entropy": ("Assignment entropy", "how undecided an image is between prototypes"),
        "assignment_information": (
            "Assignment information",
            "how much more decided images are than between all prototypes alike",
        ),
        "cross": ("Loss across", "of a picture against sounds, and the other way round"),
        "within": ("Loss within", "of a picture against pictures, and of a sound against sounds"),
        "agreeing": ("Loss of positives", "of a video against those that CMA takes for the same"),
        "pair_cosine": ("Cosine of a picture and its sound", "in the bank; what is to rise"),
        "random_cosine_across": ("Cosine of a picture and another's sound", "in the bank"),
        "random_cosine_video": ("Cosine of any two pictures", "in the bank; 1 would be a collapse"),
        "random_cosine_audio": ("Cosine of any two sounds", "in the bank; 1 would be a collapse"),
        "bank_agreement": (
            "Shared neighbourhoods",
            "how much more alike in one modality those are that are near in the other, in standard "
            "deviations",
        ),
        "positives_certified": (
            "Certified positives",
            "share of the videos whose positives a search in cells shows to be the best of all",
        ),
        "positives_mutual": ("Mutual positives", "share of the positives of which each is the other's"),
        "positives_kept": ("Positives kept", "share that the last search had found, too"),
        "embedding_std": ("Embedding spread", "1 on the whole sphere; 0 would be a collapse"),
        "rankme": ("RankMe", "effective number of dimensions that the embedding uses"),
    },
    "timing.jsonl": {
        "images_per_second": ("Samples per second", "read and trained on, all crops of each"),
        "data_wait_share": (
            "Waiting for data",
            "share of the time in which a step had to wait for its batch",
        ),
    },
}
# Of metrics.jsonl: what says no more than the step does.
_PLACES = ("step", "epoch")


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """A chart of one number, with what it is called and means."""

    title: str
    meaning: str
    chart: Markup


def training_curves(runs: Mapping[str, Path], *, tones: tuple[str, ...] = ("t1",)) -> list[TrainingCurve]:
    """All that some runs have recorded and that people look at: what every method has, then parts of a loss
    that nobody has described here, under their own names.

    Args:
        runs: name in the legend → folder, as many as there are tones.
    """
    read = {
        name: {
            "metrics.jsonl": read_curves(folder / "metrics.jsonl"),
            "timing.jsonl": read_curves(folder / "timing.jsonl", MEASURED["timing.jsonl"]),
        }
        for name, folder in runs.items()
    }
    charts, described = [], MEASURED["metrics.jsonl"]
    recorded = dict.fromkeys(key for found in read.values() for key in found["metrics.jsonl"])
    own = {
        key: (key.replace("_", " ").capitalize(), f"recorded as {key}")
        for key in recorded
        if key not in described and key not in _PLACES
    }
    for file, wanted in (("metrics.jsonl", described | own), ("timing.jsonl", MEASURED["timing.jsonl"])):
        for key, (title, meaning) in wanted.items():
            found = {name: curves[file][key] for name, curves in read.items() if key in curves[file]}
            found = {name: curve for name, curve in found.items() if curve.points}
            if found:
                charts.append(_drawn(title, meaning, found, dict(zip(runs, tones, strict=True))))
    return charts


def _drawn(title: str, meaning: str, curves: Mapping[str, Curve], tones: Mapping[str, str]) -> TrainingCurve:
    lines = []
    for name, curve in curves.items():
        steps, values = curve.drawn
        # A single run is what the whole page is about: its line is called what the number is.
        lines.append(Series(name=name if len(tones) > 1 else title, x=steps, y=values, tone=tones[name]))
    chart = line_chart(lines, title=title, x_label="step")
    return TrainingCurve(title=title, meaning=meaning + thinning(curves.values()), chart=chart)
