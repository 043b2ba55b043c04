"""Claim: on synthesised clips both of AVID's trunks are ahead of random ones, by nearest neighbours and from
five labelled clips of each kind, whatever the seed.

    python benchmarks/avid_demo.py FOLDER [--seeds 0 1 2] [KEY=VALUE ...]

Runs the graph `avid_demo` for each seed of the trainings, on the same clips, and prints a table in Markdown:
accuracy on the test clips with its 95 % interval, and whether the intervals of AVID and of random trunks are
apart. What is there already is not made again. Ends with 1 if some are not apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TRAINED = ("avid", "cma", "trunk_video_random", "trunk_audio_random")
SCORES = {"knn": "kNN", "few_shot": "5-shot"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments, words = parser.parse_known_args()
    apart = []
    print("| seed | | random | AVID | AVID, then CMA | apart |\n|---|---|---|---|---|---|")
    for seed in arguments.seeds:
        seeds = [f"stages.{stage}.recipe.seed={seed}" for stage in TRAINED]
        command = ["dag", "avid_demo", f"folder={arguments.folder}", *seeds, *words]
        subprocess.run([sys.executable, "-m", "pipeline.cli", *command], check=True, stdout=sys.stderr)
        for modality in ("video", "audio"):
            for score, title in SCORES.items():
                random, avid, cma = (
                    metrics(arguments.folder, f"{score}_{modality}{trunk}")
                    for trunk in ("_random", "", "_cma")
                )
                apart.append(avid["top1_low"] > random["top1_high"])
                cells = " | ".join(map(shown, (random, avid, cma)))
                print(f"| {seed} | {modality}, {title} | {cells} | {'yes' if apart[-1] else 'no'} |")
    sys.exit(not all(apart))


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    """What a stage of the newest run of the graph found out."""
    found: dict[str, Any] = json.loads((folder / "latest" / stage / "receipt.json").read_text())["metrics"]
    return found


def shown(found: dict[str, Any]) -> str:
    """An accuracy with its interval, in percent."""
    return f"{100 * found['top1']:.1f} ({100 * found['top1_low']:.1f} to {100 * found['top1_high']:.1f})"


if __name__ == "__main__":
    main()
