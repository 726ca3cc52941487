"""What the commands show on a terminal: its width, colours, units, and that they are at work."""

import json
import os
import re
import subprocess
import sys
from statistics import median

import click
import pytest
from command import invoke
from cupycorr.cli import environment
from cupycorr.cli.bench import report

from cupycorr.cpu import engine as numpy_engine

pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
SMALL = ["-b", "1", "-c", "3", "--height", "12", "-w", "11", "--engine", "numpy"]
COLOUR = re.compile(r"\x1b\[3[12]m")


def on_a_terminal(*words, columns, **variables):
    """Run the command on a terminal, and return what it shows."""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI")}
    environment |= {"COLUMNS": str(columns), "TERM": "xterm"} | variables
    process = subprocess.Popen(
        [sys.executable, "-m", "cupycorr", *map(str, words)],
        stdout=theirs, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the end, on Linux
            break
        if not part:
            break
        shown += part
    os.close(ours)
    with process:
        assert process.wait() == 0, process.stderr.read()
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    "columns", [60, *(pytest.param(size, marks=pytest.mark.slow) for size in (40, 80, 100))]
)
def test_bench_fits_the_terminal_and_keeps_words_names_and_units(columns):
    pytest.importorskip("torch")
    words = ["bench", "cpu", *SMALL[:-2], "-r", "1"]
    words += ["--against", "torch-slices", "--against", "torch-all-pairs"]
    shown = click.unstyle(on_a_terminal(*words, columns=columns))
    before_lines = shown[: shown.index("cupycorr numpy  Forward")]
    assert max(map(len, before_lines.splitlines())) <= columns
    piped = invoke(*words).stdout
    assert set(report.MEANING) <= set(piped.splitlines())
    assert " ".join(report.MEANING) in " ".join(shown.split())
    for name in ("cupycorr numpy", "cupycorr torch", "torch-slices", "torch-all-pairs"):
        rows = re.findall(rf"^{name} +\d.*", before_lines, re.MULTILINE)
        assert len(rows) == 2
    heads = re.findall(r"^(?:forward|backward) .*", before_lines, re.MULTILINE)
    assert len(heads) == 2
    for head in heads:
        assert re.search(r"min (s|ms|us)\b", head)
        assert ("runs" in head) == (columns > 80)
    assert shown.count("No room for") == (columns <= 80)


@pytest.mark.parametrize(
    ("device", "said"), [("cpu", b"getting ready"), ("cuda", b"looking for CUDA")]
)
def test_bench_says_at_once_that_it_is_at_work(device, said):
    ours, theirs = pty.openpty()
    words = [sys.executable, "-c", AT_WORK, device]
    environment = os.environ | {"TERM": "xterm"}
    subprocess.run(words, stdout=subprocess.DEVNULL, stderr=theirs, check=True, env=environment)
    os.close(theirs)
    assert said in os.read(ours, 1 << 16)
    os.close(ours)


AT_WORK = """
import sys
from cupycorr.cli import environment, main
from cupycorr.cli.bench import measure

def imports(*_):  # torch or CuPy, which takes seconds
    sys.exit(bool({"torch", "cupy"} & set(sys.modules)))

measure.threads = environment.require_cuda = imports
main(["bench", *sys.argv[1:]])
"""


def test_verdicts_are_coloured_on_a_terminal_alone():
    words = ["gradcheck", "cpu", *SMALL]
    shown = on_a_terminal(*words, columns=80)
    assert COLOUR.findall(shown) == ["\x1b[32m"] * shown.count("ok    ") != []
    assert not COLOUR.search(on_a_terminal(*words, columns=80, NO_COLOR="1"))
    assert not COLOUR.search(invoke(*words).stdout)


@pytest.mark.parametrize(
    ("seconds", "unit"), [(2e-6, "us"), (9e-4, "us"), (2e-3, "ms"), (0.9, "ms"), (3.0, "s")]
)
def test_a_table_has_the_unit_that_suits_it(seconds, unit, monkeypatch, capsys):
    timing = report.statistics([seconds]) | {"first": seconds, "extra_bytes": 0}
    one = {"name": "cupycorr numpy", "status": "timed", "forward": timing, "backward": timing}
    problem = {
        "name": "a layer", "shape": [1, 1, 2, 2], "description": "", "implementations": [one],
        "floors": {},
    }  # fmt: skip
    report.show({"dtype": "float32", "device": "cpu"}, problem, "us")
    out = capsys.readouterr().out
    assert f"forward         min {unit}  median {unit}" in out
    assert f"Forward: {seconds * 1e6:.3f}/" in out


def test_ratios_are_of_the_least_times(tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "bench.json"
    out = invoke("bench", "cpu", *SMALL[:-2], "-r", "5", "--json", file).stdout
    numpy, torch = json.loads(file.read_text())["problems"][0]["implementations"]
    shown = [float(row.split()[-1]) for row in re.findall(r"^cupycorr numpy +\d.*", out, re.M)]
    for ratio, step in zip(shown, ("forward", "backward"), strict=True):
        assert ratio == round(min(numpy[step]["seconds"]) / min(torch[step]["seconds"]), 2)
        assert median(numpy[step]["seconds"]) == numpy[step]["median"]


def test_a_scale_that_is_given_is_that_of_tables_and_lines_alike():
    out = invoke("bench", "cpu", *SMALL, "-r", "1", "--scale", "us").stdout
    assert re.findall(r"^(forward|backward) +min us", out, re.M) == ["forward", "backward"]
    out = invoke("bench", "cpu", *SMALL, "-r", "1", "--scale", "s").stdout
    assert re.findall(r"^(forward|backward) +min s ", out, re.M) == ["forward", "backward"]
    assert re.search(r"Forward: [\d.]+/[\d.]+ s ", out)


def test_a_reason_is_broken_between_words_on_a_terminal_and_left_whole_in_a_pipe(
    monkeypatch, capsys
):
    reason = "RuntimeError: " + " ".join(["spatial_correlation_sampler"] * 9)
    one = {"name": "torch-slices", "status": "failed", "reason": reason}
    problem = {"name": "a layer", "shape": [1], "description": "", "implementations": [one]}
    monkeypatch.setenv("COLUMNS", "60")
    written = {"device": "cpu", "dtype": "float32"}
    line = f"torch-slices: failed: {reason}"
    report.show(written, problem, "us")
    assert capsys.readouterr().out.splitlines()[-1] == line
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    report.show(written, problem, "us")
    shown = click.unstyle(capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 60
    assert line in " ".join(shown.split())


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0.00"), (0.0301234, "0.0301"), (0.8771, "0.877"), (28.0, "28.00"), (110.234, "110.2"),
     (999.96, "1000"), (34298.1, "34298")],
)  # fmt: skip
def test_a_number_has_three_or_four_figures(value, shown):
    assert report.number(value) == shown


def test_what_cuda_lacks_is_red_and_what_is_there_green(monkeypatch):
    findings = [environment.Finding(name, name == "driver", "") for name in ("driver", "GPU")]
    monkeypatch.setattr(environment, "cuda_findings", lambda: findings)
    monkeypatch.delenv("NO_COLOR", raising=False)
    outcome = invoke("warmup", color=True)
    assert "\x1b[32mok    \x1b[0m  driver" in outcome.stderr
    assert "\x1b[31mnot ok\x1b[0m  GPU" in outcome.stderr
    assert "\x1b" not in invoke("warmup").stderr


@pytest.mark.parametrize(
    ("words", "verdict"),
    [(["gradcheck"], "\x1b[31mFAILED\x1b[0m  numpy float64: cost "),
     (["bench", "-r", "1"], "\x1b[31mcupycorr numpy: wrong: cost: ")],
    ids=["gradcheck", "bench"],
)  # fmt: skip
@pytest.mark.parametrize("variable", [None, "1"])
def test_a_wrong_result_is_red_unless_colours_are_refused(monkeypatch, words, verdict, variable):
    right = numpy_engine.run

    def wrong(asked, arrays, *args, **kwargs):
        right(asked, arrays, *args, **kwargs)
        if "cost" in arrays:
            wrong.calls += 1
            arrays["cost"][0, 0, 0, 0, 0] += wrong.calls

    wrong.calls = 0
    monkeypatch.setattr(numpy_engine, "run", wrong)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable is not None:
        monkeypatch.setenv("NO_COLOR", variable)
    arguments = [words[0], "cpu", *SMALL, *words[1:]]
    outcome = invoke(*arguments, color=True)
    assert outcome.exit_code == 1
    if variable is None:
        assert verdict in outcome.stdout
    else:
        assert "\x1b" not in outcome.stdout
        assert click.unstyle(verdict) in outcome.stdout
