"""Which share of a crawl's CPU time goes where: stacks sampled by py-spy in the crawler and its checkers."""

import subprocess
from collections import Counter
from pathlib import Path

# The first part counts of which a word occurs in the stack, looked for from the innermost frame outwards.
_PARTS = {
    "checker: decode": ("load (PIL/", "decode (PIL/"),
    "checker: resize": ("resize (PIL/",),
    "checker: encode": ("_encode (ingest/",),
    "checker: perceptual hash": ("perceptual_hash (ingest/",),
    "checker: headers, sha256": ("check (ingest/image/check.py",),
    "checker: pipes": ("main (ingest/image/check_worker.py",),
    "crawler: pipes to checkers": ("(ingest/image/check_pool.py", "(ingest/image/check_worker.py"),
    "crawler: TLS": ("(ssl.py", "asyncio/sslproto.py"),
    "crawler: robots": ("(ingest/web/robots_txt.py",),
    "crawler: HTTP": ("(aiohttp/", "(ingest/web/http_client.py", "(yarl/", "(multidict/"),
    "crawler: turns and loop": (
        "(ingest/web/",
        "(ingest/progress/",
        "(asyncio/",
    ),
    "crawler: shards and commits": (
        "(ingest/dataset/shard.py",
        "(ingest/dataset/commit.py",
        "(ingest/store/",
    ),
    "crawler: reordering": ("(ingest/crawl/results.py",),
    "crawler: planning": ("(ingest/plan/", "(ingest/sources/"),
    "start-up": ("_find_and_load (",),
}
_RATE = 200


def profile(command: list[str], environment: dict[str, str], folder: Path, py_spy: str) -> dict[str, float]:
    """Run a crawl under py-spy; the share of each part, largest first, of what was running when sampled."""
    stacks = folder / "stacks.txt"
    sampler = [py_spy, "record", "--subprocesses", "--format", "raw", "--rate", str(_RATE), "--nonblocking"]
    subprocess.run(
        [*sampler, "--output", str(stacks), "--", *command], env=environment, check=True, capture_output=True
    )
    counts: Counter[str] = Counter()
    for line in stacks.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        counts[_part(stack.split(";"))] += int(count)
    return {part: count / counts.total() for part, count in counts.most_common()}


def _part(frames: list[str]) -> str:
    if any("_find_and_load (" in frame for frame in frames):
        return "start-up"
    for frame in reversed(frames):
        for part, words in _PARTS.items():
            if any(word in frame for word in words):
                return part
    return "other"
