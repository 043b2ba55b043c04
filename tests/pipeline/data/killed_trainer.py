"""A trainer that takes one batch from two workers, says their ids, and waits to be killed or exits."""

import multiprocessing
import sys
import time

import torch

from pipeline.data.loader import Loader
from pipeline.recipe.data import Data


def main() -> None:
    data = Data.model_validate(
        {"root": sys.argv[1], "batch_size": 8, "crops": [{"count": 2, "size": 8, "scale": [0.3, 1.0]}]}
    )
    loader = Loader(data, seed=0, rank=0, world_size=1, workers=2, device=torch.device("cpu"))
    batches = loader.from_step(0)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    if sys.argv[2] == "wait":
        time.sleep(600)
    # Exits with the iterator alive, as after an error whose traceback holds it.
    sys.modules["__main__"].__dict__["kept"] = batches


if __name__ == "__main__":
    main()
