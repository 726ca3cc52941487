"""``cupycorr bench compare``: regressions, noise, and documents that cannot be compared."""

import json
import re

import numpy as np
import pytest
from command import invoke
from cupycorr.cli.bench import compare as module
from cupycorr.cli.bench import measure, report

verdict = module.verdict


def timing(middle, spread=0.02, runs=20, least=None):
    """Return what a document says of runs between half of the spread below and above."""
    seconds = (middle * (1 + spread * np.linspace(-1, 1, runs))).tolist()
    return report.statistics(seconds) | ({} if least is None else {"min": least})


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (timing(1.0), timing(1.0), "same"),
        (timing(1.0), timing(1.1), "slower"),
        (timing(1.1), timing(1.0), "faster"),
        (timing(1.0), timing(1.01), "same"),
        # One wide document is enough to doubt both.
        (timing(1.0, spread=0.3), timing(1.1), "same"),
        (timing(1.0), timing(1.1, spread=0.3), "same"),
        # Now and then the machine did something else, and yet all got slower.
        (timing(1.0), timing(1.1) | {"q3": 9.0}, "slower"),
        (timing(1.0) | {"q3": 9.0}, timing(1.1), "same"),
        # The median moved and the least time did not: the machine was busy.
        (timing(1.0), timing(1.1, least=timing(1.0)["min"]), "same"),
        (timing(1.0), timing(1.1, least=0.5), "same"),
        (timing(1.1), timing(1.0, least=2.0), "same"),
        (timing(1.0, runs=9), timing(2.0), "few runs"),
        (timing(1.0), timing(2.0, runs=9), "few runs"),
        (timing(1.0, runs=module.LEAST_RUNS), timing(2.0, runs=module.LEAST_RUNS), "slower"),
        (timing(1.0, spread=0), timing(1.0, spread=0), "same"),
    ],
)
def test_a_verdict_needs_quartiles_apart_and_least_times_that_agree(a, b, wanted):
    assert verdict(a, b) == wanted


def test_noise_alone_is_seldom_a_verdict_and_a_tenth_seldom_noise():
    rng = np.random.default_rng(0)

    def runs(factor):
        # Skewed to above, as times of a machine that does something else now and then.
        return report.statistics((factor * (1 + 0.02 * rng.gamma(2, 1, 30))).tolist())

    pairs = [(runs(1), runs(1), runs(1.1)) for _ in range(300)]
    assert sum(verdict(a, b) != "same" for a, b, _ in pairs) <= 3
    assert sum(verdict(a, b) == "slower" for a, _, b in pairs) >= 290


def document(factor=1.0):
    """Return a document of two problems, with two implementations and floors."""
    passes = {name: timing(factor * 1e-3) for name in measure.PASSES}
    problem = {
        "name": "pwc", "shape": [1, 2, 3, 4], "geometry": {"patch_size": [9, 9]},
        "similarity": "product", "channels_last": False,
        "floors": {"copy": {name: timing(1e-4) for name in measure.PASSES}},
        "implementations": [
            {"name": "cupycorr numpy", "status": "timed", **passes},
            {"name": "torch-slices", "status": "timed",
             **{name: timing(1e-2) for name in measure.PASSES}},
        ],
    }  # fmt: skip
    return {
        "schema": report.SCHEMA, "device": "cpu", "dtype": "float32", "threads": 2,
        "input": "random", "machine": {"processor": "P", "cores": 2, "system": "S", "load": 0.1},
        "problems": [problem, problem | {"name": "stereo"}],
    }  # fmt: skip


@pytest.fixture
def compared(tmp_path):
    """Return a function that writes two documents and compares them."""

    def compare(a, b, *words):
        files = [tmp_path / "a.json", tmp_path / "b.json"]
        for file, one in zip(files, (a, b), strict=True):
            file.write_text(one if isinstance(one, str) else json.dumps(one))
        return invoke("bench", "compare", *files, *words)

    return compare


def changed(path, value):
    """Return a copy of a document with another value at a path."""
    result = json.loads(json.dumps(document()))
    *keys, last = path
    inner = result
    for key in keys:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return result


def test_equal_documents_have_nothing_slower(compared):
    outcome = compared(document(), document())
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.splitlines()[-1] == "8 same."
    rows = [line for line in outcome.stdout.splitlines() if re.search(r" same$", line)]
    assert len(rows) == 2 * 2 * 3  # problems, passes, implementations and the floor


FORWARD = ["problems", 1, "implementations", 0, "forward"]


def test_a_row_that_became_slower_is_named_and_ends_with_1(compared):
    outcome = compared(document(), changed(FORWARD, timing(1.2e-3)))
    assert outcome.exit_code == 1
    (line,) = [line for line in outcome.stdout.splitlines() if line.endswith("slower")]
    assert line.split() == ["stereo", "cupycorr", "numpy", "forward", "1.000", "1.200", "1.200",
                            "2.0%", "slower"]  # fmt: skip
    assert outcome.stdout.splitlines()[-1] == "7 same, 1 slower."


def test_a_row_that_became_faster_is_fine(compared):
    outcome = compared(document(), changed(FORWARD, timing(0.8e-3)))
    assert outcome.exit_code == 0
    assert "7 same, 1 faster." in outcome.stdout


@pytest.mark.parametrize(("status", "code"), [("wrong", 1), ("failed", 1), ("skipped", 0)])
def test_a_row_that_is_no_longer_timed_is_named_with_its_reason(compared, status, code):
    row = {"name": "torch-slices", "status": status, "reason": "no luck"}
    outcome = compared(document(), changed(["problems", 0, "implementations", 1], row))
    assert outcome.exit_code == code
    assert re.search(rf"^pwc +torch-slices +{status}  no luck$", outcome.stdout, re.MULTILINE)


def test_floors_that_differ_are_a_warning_and_no_regression(compared):
    b = changed(["problems", 0, "floors", "copy", "forward"], timing(3e-4))
    outcome = compared(document(), b)
    assert outcome.exit_code == 0
    assert "(copy)" in outcome.stdout
    assert "Warning: floors differ too" in outcome.stdout
    assert "Warning" not in compared(document(), document()).stdout


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], 99, f"b.json has schema 99, this cupycorr reads {report.SCHEMA}"),
        (["schema"], None, f"b.json has schema None, this cupycorr reads {report.SCHEMA}"),
        (["machine", "processor"], "Q", "machine.processor is P in A and Q in B"),
        (["machine", "cores"], 16, "machine.cores is 2 in A and 16 in B"),
        (["threads"], 1, "threads is 2 in A and 1 in B"),
        (["dtype"], "float16", "dtype is float32 in A and float16 in B"),
        (["cuda"], {"name": "H100"}, "cuda.name is None in A and H100 in B"),
    ],
)
def test_other_machines_settings_and_schemas_are_refused_unless_told(
    compared, path, value, message
):
    b = changed(path, value)
    outcome = compared(document(), b)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert "--anyway" in outcome.stderr
    outcome = compared(document(), b, "--anyway")
    assert outcome.exit_code == 0
    assert re.search(rf"^Warning: .*{re.escape(message)}$", outcome.stderr, re.MULTILINE)
    assert "8 same." in outcome.stdout


def test_another_load_or_library_is_no_other_machine(compared):
    assert compared(document(), changed(["machine", "load"], 7.0)).exit_code == 0
    assert compared(document(), changed(["machine", "libraries"], {"numpy": "3"})).exit_code == 0


def test_only_equal_problems_are_compared(compared):
    shape = ["problems", 0, "shape"]
    outcome = compared(document(), changed(shape, [1, 2, 3, 5]))
    assert outcome.stdout.splitlines()[-1] == "4 same."
    outcome = compared(document(), changed(["problems"], []))
    assert outcome.exit_code == 2
    assert "no row in common" in outcome.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "b.json is no JSON document"),
        ("[1]", "b.json is no document of cupycorr bench --json"),
        ("{}", "b.json is no document of cupycorr bench --json"),
        (json.dumps(changed(FORWARD, {"median": 1})), "lacks a field of schema"),
    ],
)
def test_a_file_that_is_no_document_is_refused(compared, text, message):
    outcome = compared(document(), text)
    assert outcome.exit_code == 2
    assert message in outcome.stderr


def test_two_runs_of_bench_can_be_compared(tmp_path):
    words = ["-b", "1", "-c", "2", "--height", "6", "-w", "7", "-k", "1", "--engine", "numpy"]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        assert invoke("bench", "cpu", *words, "-r", "2", "--json", file).exit_code == 0
    outcome = invoke("bench", "compare", *files)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.splitlines()[-1] == "2 few runs."


def test_the_help_of_bench_leads_to_compare_and_that_says_its_rule():
    assert "bench compare A.json B.json" in invoke("bench", "--help").stdout
    text = " ".join(invoke("bench", "compare", "--help").stdout.split())
    assert text.startswith("Usage: main bench compare [OPTIONS] A B")
    assert "(its lower quartile is above the upper one), and its least time is longer too" in text
    assert f"Both need {module.LEAST_RUNS} runs" in text
