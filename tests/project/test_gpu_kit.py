"""`.ci/gpu` goes on where a step fails or takes too long, and says so in its summary."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KIT = Path(__file__).resolve().parents[2] / ".ci" / "gpu"
pytestmark = pytest.mark.skipif(not KIT.exists(), reason="an sdist has no .ci")
LINE = re.compile(r"(\w+) +(\S.*?) {2,}(ok|failed|timed out|skipped|running) +\d+ s  (.*)")


@pytest.fixture
def run(tmp_path):
    """Return a function that runs stages by a Python that does what it is told."""

    def run(does, *stages, **variables):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/bash\n{does}\n")
        python.chmod(0o755)
        done = subprocess.run(
            [KIT, tmp_path / "out", *stages], capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHON": str(python)} | variables,
        )  # fmt: skip
        summary = (tmp_path / "out" / "summary.txt").read_text()
        assert done.stdout == summary, done.stderr
        found = [LINE.fullmatch(line) for line in summary.splitlines()]
        return done.returncode, [match.groups() for match in found], tmp_path / "out"

    return run


# The first question of every stage is whether there is a GPU.
WITH_GPU = 'case "$*" in *find*cuda_findings*) echo a GPU; exit;; esac\n'


def outcomes(lines):
    return [(stage, step, outcome) for stage, step, outcome, _ in lines if outcome != "running"]


def test_without_a_gpu_every_stage_is_skipped_with_the_reason(run):
    status, lines, _ = run("echo line one; echo Driver: too old; exit 1")
    assert status == 0
    assert outcomes(lines) == [
        (stage, "-", "skipped") for stage in ("tests", "bench", "tiles", "peers", "sanitizer")
    ]
    assert {reason for *_, reason in lines} == {"no GPU can be used: Driver: too old"}


def test_a_step_that_fails_is_told_with_its_last_line_and_the_next_ones_run(run):
    fails = 'case "$*" in *float32*) echo the reason; echo; exit 3;; *) echo fine;; esac'
    status, lines, folder = run(WITH_GPU + fails, "tiles", "bench")
    assert status == 1
    assert outcomes(lines)[:3] == [
        ("tiles", "launches float32", "failed"),
        ("tiles", "launches float16", "ok"),
        ("bench", "host time", "ok"),
    ]
    assert {reason for *_, outcome, reason in lines if outcome == "failed"} == {"the reason"}
    assert (folder / "tiles.log").read_text().endswith("fine\n")


def test_a_step_that_takes_too_long_is_ended_and_the_next_stage_runs(run):
    slow = 'case "$*" in *tiles-*) exec sleep 30;; esac'
    status, lines, _ = run(WITH_GPU + slow, "tiles", "bench", STAGE_SECONDS="1")
    assert status == 1
    assert outcomes(lines)[:3] == [
        ("tiles", "launches float32", "timed out"),
        ("tiles", "launches float16", "skipped"),
        ("bench", "host time", "ok"),
    ]


def test_before_a_step_begins_the_summary_says_so(run):
    _, lines, _ = run(WITH_GPU, "tiles")
    assert [outcome for *_, outcome, _ in lines] == ["running", "ok", "running", "ok"]


def test_an_unknown_stage_is_refused_and_the_others_run(run):
    status, lines, _ = run(WITH_GPU, "test", "tiles")
    assert status == 1
    assert outcomes(lines)[0] == ("test", "-", "skipped")
    assert outcomes(lines)[1:] == [
        ("tiles", "launches float32", "ok"), ("tiles", "launches float16", "ok"),
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("options", "dtype"), [([], "float32"), (["--tf32"], "TF32")])
def test_launches_are_timed_beside_what_the_model_predicts(options, dtype, tmp_path):
    file = tmp_path / "launches.jsonl"
    words = ["--preset", "pwc-l6", "--tiles", "2", "--runs", "2", *options]
    path = os.pathsep.join([str(KIT.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, KIT.with_name("launches.py"), file, *words],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    launches = [json.loads(line) for line in file.read_text().splitlines()]
    results = ("cost", "gradient1", "gradient2")  # of kernels with or without tensor cores
    assert sorted((one["kernel"].partition("_")[2], one["rank"]) for one in launches) == [
        (result, rank) for result in results for rank in range(2)
    ]
    for one in launches:
        assert one["dtype"] == dtype
        assert one["predicted_seconds"] > 0
        assert min(one["seconds"]) > 0
        assert len(one["seconds"]) == 2
    assert len(done.stdout.splitlines()) == 2 + len(launches)
