"""Draw docs/cifar10.svg from the two tables of CIFAR-10 in benchmarks/RESULTS.md.

python docs/cifar10_figure.py
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
METHODS = ("SwAV", "Barlow Twins", "BYOL", "SimSiam")
PIXELS = "raw pixels"
ERROR = 1.0  # points: 95 % of 10,000 test images, by the binomial


def main() -> None:
    """Two bars for each method, and raw pixels as a line."""
    text = (HERE.parent / "benchmarks" / "RESULTS.md").read_text()
    section = re.split(r"^## ", text[text.index("## CIFAR-10:") + 3 :], maxsplit=1, flags=re.M)[0]
    ours = [accuracy(section, rf"^\| {method} \|.*?\| \*\*([\d.]+)\*\*") for method in METHODS]
    theirs = [accuracy(section, rf"^\| {method} \(lightly\) \| ([\d.]+)") for method in METHODS]
    pixels = accuracy(section, rf"^\| {PIXELS} \| \| \| ([\d.]+)")

    plt.rcParams |= {"svg.hashsalt": "cifar10", "font.size": 9}
    figure, axes = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
    for name, values, shift, colour in (
        ("this pipeline", ours, -0.2, "#2a6f97"),
        ("lightly", theirs, 0.2, "#b8b8b8"),
    ):
        places = [number + shift for number in range(len(METHODS))]
        axes.bar(places, values, 0.38, yerr=ERROR, label=name, color=colour, error_kw={"lw": 1})
        for place, value in zip(places, values, strict=True):
            axes.text(place, value + ERROR + 0.3, f"{value:.1f}", ha="center")
    axes.axhline(pixels, color="black", lw=0.8, ls=":", label=f"{PIXELS}, {pixels:.1f}")
    axes.set(xticks=range(len(METHODS)), xticklabels=METHODS, ylabel="kNN top-1, %", ylim=(0, 60))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="upper right")
    figure.savefig(HERE / "cifar10.svg", metadata={"Date": None})


def accuracy(text: str, pattern: str) -> float:
    found = re.search(pattern, text, re.M)
    if found is None:
        raise SystemExit(f"benchmarks/RESULTS.md has no {pattern}")
    return float(found[1])


if __name__ == "__main__":
    main()
