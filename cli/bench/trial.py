"""A first check of others' compiled code, in a process of its own that it may end."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

from ..options import LookupProblem, Problem
from . import lookups, measure, peers

PROGRAM = "from cupycorr.cli.bench import trial; trial.run()"


def of(name: str, problem: Problem | LookupProblem, dtype: str, device: str) -> measure.Outcome:
    """Compute and check a problem by another implementation, in a process of its own.

    A crash there, or a device that it leaves unusable, costs nobody else's row.

    Returns
    -------
    Outcome
        "timed" without timings if it is right, else as `measure.compare` tells it.
    """
    asked = pickle.dumps((name, problem, dtype, device))
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=asked, capture_output=True)
    try:
        status, reason = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):  # it ended before it could tell
        said = done.stderr.decode(errors="replace").split("\n")
        last = " ".join([line for line in said if line.strip()][-1:])
        status, reason = "failed", f"ended its process with status {done.returncode}: {last[:200]}"
    return measure.Outcome(name, status, reason)


def run() -> None:
    """Try what standard input asks for, and print the outcome as the last line."""
    name, problem, dtype, device = pickle.load(sys.stdin.buffer)
    maps = measure.random_maps(problem.shape, dtype)
    if isinstance(problem, LookupProblem):
        coords = lookups.coordinates(problem, lookups.flow(problem, "smooth"))
        another = lookups.IMPLEMENTATIONS[name]
        jobs = lookups.jobs([another], problem, maps, coords, dtype, device)
    else:
        one = measure.Implementation(name, "torch", peers.PEERS[name].correlate)
        jobs = measure.jobs([one], problem, maps, dtype, device)
    (outcome,) = measure.compare(jobs, runs=0, max_seconds=0, advance=lambda _: None, device=device)
    print(json.dumps([outcome.status, outcome.reason]))
