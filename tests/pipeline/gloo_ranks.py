"""Functions on real gloo processes, for the tests of what ranks compute together."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster import shared_folder
from cluster.rank.torch_dist import init_process_group

_context = multiprocessing.get_context("forkserver")
# What ranks import, once: each is then a cheap fork of a process that has run nothing.
_IMPORTED = [
    "torch.distributed",
    "fairscale.nn",
    "hypothesis",
    "numpy",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "pytest",
    "scipy.stats",
    "torch._dynamo",
    "torch.utils.tensorboard.writer",
    "ingest.crawl.crawl",
    "pipeline.train.loop",
    "pipeline.data.fork_server",  # the last: what was imported stays
]

TIMEOUT_SECONDS = 120


def start_server() -> None:
    """Start the process that ranks are forked from; before anything else starts it with fewer imports."""
    _context.set_forkserver_preload(_IMPORTED)
    forkserver.ensure_running()


def run(world: int, function: Callable[..., Any], arguments: tuple[Any, ...], *, folder: Path) -> list[Any]:
    """The result of `function(group, *arguments)` on every rank; with one rank the group is None.

    `function` is a module's own function; arguments and results are plain values or NumPy arrays.
    """
    if world == 1:
        return [function(None, *arguments)]
    store = Path(tempfile.mkdtemp(dir=folder)) / "store"
    pipes = [_context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        _context.Process(target=_rank, args=(rank, world, store, pipes[rank][1], function, arguments))
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        answers = [_receive(receiver, rank) for rank, (receiver, _) in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()
    errors = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(answers) if not ok]
    if errors:
        raise AssertionError("\n".join(errors))
    return [value for _, value in answers]


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function(*arguments)` in a process of its own, with which goes what it changes."""
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_answer, args=(sender, function, arguments))
    try:
        process.start()
        sender.close()
        ok, value = _receive(receiver, 0)
    finally:
        process.kill()
        process.join()
    if not ok:
        raise AssertionError(value)
    return value


def _receive(receiver: Any, rank: int) -> tuple[bool, Any]:
    if not receiver.poll(TIMEOUT_SECONDS):
        return False, f"no answer in {TIMEOUT_SECONDS} s"
    try:
        answer: tuple[bool, Any] = receiver.recv()
    except EOFError:
        return False, f"rank {rank} died"
    return answer


def _rank(
    rank: int, world: int, store: Path, sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    def joined() -> Any:
        os.environ["SUBMIT_STORE"] = str(store)
        group, _ = init_process_group(torch.device("cpu"), rank=rank, size=world)
        result = function(group, *arguments)
        dist.barrier()
        dist.destroy_process_group()
        return result

    _answer(sender, joined, ())


def _answer(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    shared_folder.PATIENCE = 0.0  # as in the tests' own process
    try:
        result = function(*arguments)
    except Exception:
        sender.send((False, traceback.format_exc()))
    else:
        sender.send((True, result))
