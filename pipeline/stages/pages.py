"""The stages that end in a page for people."""

from __future__ import annotations

from cluster.atomic_file import write_atomically
from cluster.rank.torch_dist import choose_device
from pipeline.dag.stage import Result, Work
from pipeline.report.cifar10 import write_table
from pipeline.report.classifiers import classifiers_page
from pipeline.report.clips_report import build_clips_report
from pipeline.report.compare import compare_runs, comparison_page
from pipeline.report.run_report import build_report
from pipeline.report.transfer_figures import write_figures
from pipeline.stages.machine import gpus_held
from pipeline.transfer.compare import compare_predictions
from pipeline.transfer.predict import read_predictions


def report(work: Work) -> Result:
    """report.html, and the headline numbers."""
    device = choose_device("auto")
    build_report(work.inputs, work.recipe, work.folder / "report.html", device=device)
    return Result({}, ["report.html"], gpus_held(device))


def clips_report(work: Work) -> Result:
    """report.html, with clips to play."""
    build_clips_report(work.inputs, work.recipe, work.folder / "report.html")
    return Result({}, ["report.html"])


def compare(work: Work) -> Result:
    """compare.html: the inputs are runs, or predictions of classifiers, named on the page by their roles."""
    predictions = {name: source.path / "predictions.parquet" for name, source in work.inputs.items()}
    if all(path.is_file() for path in predictions.values()):
        found = compare_predictions({name: read_predictions(path) for name, path in predictions.items()})
        write_atomically(work.folder / "compare.html", classifiers_page(found, work.recipe.title))
        return Result(found.to_json(), ["compare.html"])
    runs = compare_runs({name: source.path for name, source in work.inputs.items()})
    write_atomically(work.folder / "compare.html", comparison_page(runs, work.recipe))
    return Result({run.name: run.to_json() for run in runs}, ["compare.html"])


def figures(work: Work) -> Result:
    """figures.html, figures.json, and each chart as an SVG file: ours beside what others have published."""
    metrics = write_figures(work.inputs, work.recipe, work.folder)
    return Result(metrics, ["figures.html", "figures.json", "charts"])


def cifar10_table(work: Work) -> Result:
    """results.md and results.html: what was reached, beside what others have published."""
    return Result(write_table(work.inputs, work.folder), ["results.md", "results.html"])
