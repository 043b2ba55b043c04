"""A small training on a lab's nodes, as its user sees it: commands, and the files of the run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lab import SlurmLab, wait_until

from cluster.run.folder import RunFolder
from cluster.run.restarts import Restart, read_restarts
from cluster.run.status import Status


@dataclass(frozen=True)
class Submitter:
    """The `submit` command on the lab's login node; runs go to `folder`/runs."""

    lab: SlurmLab
    folder: Path

    def __call__(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._run("-m", "pipeline.cli", *words, check=check)

    def python(self, code: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a script where `submit` would run."""
        return self._run("-c", code, *words, check=True)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a `submit` command, and do not wait for it."""
        return self._start("-m", "pipeline.cli", *words)

    def start_python(self, code: str, *words: str) -> subprocess.Popen[str]:
        """Start a script where `submit` would run, and do not wait for it."""
        return self._start("-c", code, *words)

    def _start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def environment(self) -> dict[str, str]:
        """What `submit` needs on the login node."""
        return os.environ | self.lab.environment | {"SUBMIT_CLUSTER": str(self.site())}

    def _run(self, *words: str, check: bool) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
        return done

    def site(self, **values: Any) -> Path:
        """Write the site file, once; the first caller says what is in it."""
        path = self.folder / "site.yaml"
        if not path.exists():
            path.write_text(
                yaml.safe_dump({"cpus_per_rank": 1, "gpus_per_node": 0, "signal_seconds": 30} | values)
            )
        return path

    def run(self, name: str) -> Training:
        """A run by its name."""
        return Training(self.folder / "runs" / name)


@dataclass(frozen=True)
class Training:
    """The run folder of a training."""

    path: Path

    def rows(self, name: str = "metrics") -> list[dict[str, Any]]:
        """metrics.jsonl, or timing.jsonl, of steps only; a last line that is being written is left out."""
        path = self.path / f"{name}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if "checkpoint" not in row]

    def restarts(self) -> list[Restart]:
        """Why attempts ended."""
        return read_restarts(RunFolder(self.path))

    def status(self) -> Status:
        """status.json."""
        return RunFolder(self.path).read_status()

    def steps_done(self) -> int:
        """Steps of the present attempt so far."""
        started = self.status().started
        return 0 if started is None else sum(row["time"] > started for row in self.rows("timing"))

    def wait_for_steps(self, count: int, *, attempt: int, seconds: float = 90.0) -> None:
        """Until an attempt, or one after it, has done so many steps."""

        def there() -> bool:
            status = self.status()
            if status.state.ended:
                raise AssertionError(f"{self.path.name} has ended: {status}")
            return status.attempt >= attempt and self.steps_done() >= count

        # Soon: meanwhile a training of few steps goes on.
        wait_until(there, f"{count} steps of attempt {attempt}", seconds, pause=0.05)

    def wait(self, state: str, seconds: float = 120.0) -> None:
        """Until the run has come to a state."""
        wait_until(lambda: self.status().state == state, f"{self.path.name} is {state}", seconds)
