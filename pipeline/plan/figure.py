"""The picture of a plan: how time and memory change from 1 GPU to 512."""

from __future__ import annotations

import io
from collections.abc import Sequence

from pipeline.plan.cost import Estimate


def plan_figure(plans: Sequence[Estimate], *, memory: float) -> str:
    """An SVG: days of the run, beside what they would be if GPUs added up perfectly; and memory by kind.

    Args:
        plans: of ascending numbers of GPUs.
        memory: bytes of one GPU.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    labels = [str(plan.gpus) for plan in plans]
    places = range(len(plans))
    figure = Figure(figsize=(10, 4), layout="constrained")
    time, space = figure.subplots(1, 2)

    time.plot(places, [plan.days for plan in plans], "o-", color="#2b6cb0", label="planned")
    ideal = [plans[0].days * plans[0].gpus / plan.gpus for plan in plans]
    time.plot(places, ideal, "--", color="#888888", label="if GPUs added up")
    time.set_yscale("log")
    time.set_ylabel("days")
    time.set_title("Time of the run")
    time.legend(frameon=False)

    kinds = [kind for kind in plans[0].memory if any(plan.memory[kind] for plan in plans)]
    bottom = [0.0] * len(plans)
    for kind, colour in zip(kinds, mpl.colormaps["tab10"].colors, strict=False):  # type: ignore[attr-defined]
        heights = [plan.memory[kind] / 1e9 for plan in plans]
        space.bar(places, heights, bottom=bottom, label=kind, color=colour)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    space.axhline(memory / 1e9, color="black", linestyle="--", label="a GPU has")
    space.set_ylim(0, min(max(bottom), 4 * memory / 1e9) * 1.05)
    space.set_ylabel("GB per GPU")
    space.set_title("Memory at the fullest moment")
    space.legend(frameon=False, fontsize="small")
    for axes in (time, space):
        axes.set_xlabel("GPUs")
        axes.set_xticks(places, labels)
        axes.spines[["top", "right"]].set_visible(False)
    with mpl.rc_context({"svg.hashsalt": "plan", "svg.fonttype": "none"}):
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()
