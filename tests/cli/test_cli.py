"""The command line: its options, what it prints and writes, and how it ends."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import GEOMETRIES
from command import installed, invoke
from cupycorr.cli import bench as bench_command
from cupycorr.cli import environment, options
from cupycorr.cli import gradcheck as gradcheck_command
from cupycorr.cli.bench import features, floors, measure, memory, peers, report

import cupycorr
from cupycorr import Geometry, Lookup, verify
from cupycorr.cpu import engine as numpy_engine
from cupycorr.cpu import threads
from cupycorr.layer import DTYPES, Layer

bench_module = sys.modules["cupycorr.cli.bench.command"]
SMALL = ["-b", "1", "-c", "3", "--height", "12", "-w", "11", "--engine", "numpy", "-r", "4"]
SPECIFIED = {
    "bench": {
        "-b": 16, "--batch-size": 16, "-k": 3, "--kernel-size": 3, "--patch": 3,
        "--patch_dilation": 2, "-c": 64, "--channel": 64, "--height": 100, "-w": 100,
        "--width": 100, "-s": 2, "--stride": 2, "-p": 1, "--pad": 1, "--scale": "us", "-r": 100,
        "--runs": 100, "--dilation": 2, "-d": "float", "--dtype": "float",
    },
    "gradcheck": {
        "-b": 2, "-k": 3, "--patch": 3, "--patch_dilation": 2, "--patch-dilation": 2, "-c": 2,
        "--height": 10, "-w": 10, "-s": 2, "-p": 1, "-d": 2, "--dilation": 2, "--batch-size": 2,
        "--kernel-size": 3, "--channel": 2, "--width": 10, "--stride": 2, "--pad": 1,
        "--dtype": ["float64"],
    },
}  # fmt: skip
COMMANDS = {"bench": bench_command, "gradcheck": gradcheck_command}


def measured(tmp_path, *words):
    """Run ``bench cpu`` and return its output and its JSON document."""
    file = tmp_path / "bench.json"
    outcome = invoke("bench", "cpu", *words, "--json", file)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout, json.loads(file.read_text())


@pytest.mark.parametrize(
    ("command", "flag"), [(c, flag) for c, flags in SPECIFIED.items() for flag in flags]
)
def test_an_option_has_the_name_and_default_of_the_replaced_program(command, flag):
    defaults = {name: option.default for option in COMMANDS[command].params for name in option.opts}
    assert defaults[flag] == SPECIFIED[command][flag]


def test_choices_are_those_of_the_replaced_program():
    choices = {p.name: getattr(p.type, "choices", None) for p in bench_command.params}
    assert list(choices["dtype"]) == ["half", "bfloat", "float", "double"]
    assert list(choices["scale"]) == ["s", "ms", "us"]
    assert list(choices["device"]) == ["cpu", "cuda"]


def test_geometry_options_take_an_int_or_a_pair(tmp_path):
    words = ["-k", "2,3", "--patch", "1,5", "-s", "3", "-p", "-1,1", "--dilation", "2,1"]
    words += ["--first-displacement=0,-4"]
    _, document = measured(tmp_path, *SMALL, *words)
    assert document["problems"][0]["geometry"] == {
        "kernel_size": [2, 3], "patch_size": [1, 5], "dilation_patch": [2, 2], "stride": [3, 3],
        "padding": [-1, 1], "dilation": [2, 1], "first_displacement": [0, -4],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-k", "0"], "kernel_size must be at least 1, got 0"),
        (["-k", "1,x"], "'1,x' is neither an int nor two ints"),
        (["--patch", "1,2,3"], "neither an int nor two ints"),
        (["-s", "2.5"], "neither an int nor two ints"),
        (["--height", "2"], "the taps must fit into the padded image"),
        (["-b", "-1"], "-1 is not in the range"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_size_is_a_usage_error(command, words, message):
    outcome = invoke(command, "cpu", *words)
    assert outcome.exit_code == 2
    assert message in outcome.stderr


@pytest.mark.parametrize("similarity", ["product", "l1"])
def test_gradcheck_passes_and_counts_its_checks(similarity):
    options = ["--engine", "numpy", "--dtype", "all", "--similarity", similarity]
    outcome = invoke("gradcheck", "cpu", *options)
    *lines, count = outcome.stdout.splitlines()[1:]
    assert outcome.exit_code == 0
    assert all(line.startswith("ok ") for line in lines)
    assert count == f"{len(lines)} passed, 0 failed"
    for dtype in DTYPES:
        assert any(f"numpy {dtype}: adjoint identity" in line for line in lines) == (
            dtype in ("float32", "float64")
        )


@pytest.mark.parametrize("similarity", ["product", "l1"])
def test_gradcheck_of_torch_differentiates_numerically(similarity):
    pytest.importorskip("torch")
    words = ["-b", "1", "--height", "6", "-w", "5", "-k", "2", "--patch", "2"]
    words += ["--similarity", similarity]
    outcome = invoke("gradcheck", "cpu", "--engine", "torch", *words)
    assert outcome.exit_code == 0, outcome.stdout
    assert "ok      torch float64: torch.autograd.gradcheck " in outcome.stdout
    assert "ok      torch float64: torch.autograd.gradgradcheck " in outcome.stdout


@pytest.mark.parametrize("what", ["cost", "grad_fmap1", "grad_fmap2"])
@pytest.mark.parametrize("similarity", ["product", "l1"])
@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_gradcheck_fails_on_a_planted_error(monkeypatch, engine, similarity, what):
    if engine == "torch":
        pytest.importorskip("torch")
    right = numpy_engine.run

    def wrong(asked, arrays, *args, **kwargs):
        right(asked, arrays, *args, **kwargs)
        if what in arrays:
            arrays[what][(0,) * arrays[what].ndim] += 1

    monkeypatch.setattr(numpy_engine, "run", wrong)
    options = ["--engine", engine, "--similarity", similarity, "--height", "6", "-w", "5"]
    outcome = invoke("gradcheck", "cpu", *options)
    assert outcome.exit_code == 1
    for check in ("exact on integers", "round-off"):
        assert f"FAILED  {engine} float64: {what} {check}" in outcome.stdout
    assert re.fullmatch(r"\d+ passed, [1-9]\d* failed", outcome.stdout.splitlines()[-1])


def test_tables_show_what_the_json_document_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "WIDTH", 140)  # room for all columns
    out, document = measured(tmp_path, *SMALL, "--scale", "ms")
    (problem,) = document["problems"]
    (one,) = problem["implementations"]
    assert problem["multiply_adds"]["backward"] == 2 * problem["multiply_adds"]["forward"]
    for name in ("forward", "backward"):
        seconds = one[name]["seconds"]
        assert len(seconds) == one[name]["runs"] == 4
        assert one[name]["min"] == min(seconds)
        assert one[name]["median"] == np.median(seconds)
        assert one[name]["mean"] == pytest.approx(np.mean(seconds))
        assert [one[name]["q1"], one[name]["q3"]] == np.quantile(seconds, [0.25, 0.75]).tolist()
        assert one[name]["first"] > 0
        section = out.split(f"{name} ")[1]
        row = next(line for line in section.splitlines() if line.startswith("cupycorr numpy"))
        cells = row.removeprefix("cupycorr numpy").split()
        numbers = {key: report.number(1e3 * value) for key, value in one[name].items()
                   if key in ("min", "median", "q1", "q3", "first")}  # fmt: skip
        shown = [numbers["min"], numbers["median"], f"{numbers['q1']}-{numbers['q3']}"]
        shown += ["4"]
        for floor in ("matmul", "copy"):
            share = problem["floors"][floor][name]["min"] / one[name]["min"]
            assert one[name]["shares"][floor] == share
            assert len(problem["floors"][floor][name]["seconds"]) == 4
            shown += [report._share(share)]
        shown += [report.number(one[name]["extra_bytes"] / 1e6)]
        shown += [numbers["first"]]
        assert cells == [*shown, "1.00"]


def test_json_document_names_the_machine_and_the_parameters(tmp_path):
    _, document = measured(tmp_path, *SMALL, "--threads", "1", "-d", "double")
    machine = document["machine"]
    assert document["threads"] == 1
    assert document["dtype"] == "float64"
    assert document["runs"] == 4
    assert machine["libraries"]["numpy"] == np.__version__
    assert machine["cores"] >= 1
    assert machine["processor"]
    assert document["problems"][0]["shape"] == [1, 3, 12, 11]


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_channels_last_maps_are_measured_in_that_order(library, tmp_path, monkeypatch):
    pytest.importorskip(library)
    one = measure.ours(library)
    orders = set()

    def correlate(*maps_and_layer):
        arrays = [np.asarray(getattr(fmap, "data", fmap)) for fmap in maps_and_layer[:2]]
        orders.update(tuple(np.argsort(array.strides)[::-1]) for array in arrays)
        return one.correlate(*maps_and_layer)

    monkeypatch.setattr(measure, "ours", lambda _: one._replace(correlate=correlate))
    words = ["-b", "2", *SMALL[2:8], "--engine", library, "-r", "1"]
    _, document = measured(tmp_path, *words)
    assert orders == {(0, 1, 2, 3)}
    assert document["problems"][0]["channels_last"] is False
    orders.clear()
    out, document = measured(tmp_path, *words, "--channels-last")
    assert orders == {(0, 2, 3, 1)}
    assert document["problems"][0]["channels_last"] is True
    assert ", channels last" in out


def test_one_line_has_the_form_of_the_replaced_program(tmp_path):
    out, _ = measured(tmp_path, *SMALL, "--scale", "ms")
    number = r"\d+\.\d{3}"
    form = rf"^cupycorr numpy  Forward: {number}/{number} ms \| Backward: {number}/{number} ms$"
    assert re.search(form, out, re.MULTILINE)


def test_lines_fit_into_100_columns(tmp_path):
    pytest.importorskip("torch")
    words = ["-b", "1", "-c", "3", "--height", "12", "-w", "11", "-r", "1", "--against", "all"]
    out, document = measured(tmp_path, *words)
    tables = out[out.index("forward ") : out.index("cupycorr numpy  Forward")]
    assert max(map(len, tables.splitlines())) <= 100
    assert len(document["problems"][0]["implementations"]) == 2 + len(peers.PEERS)


def test_max_seconds_stops_after_three_runs(tmp_path):
    _, document = measured(tmp_path, *SMALL, "-r", "50", "--max-seconds", "0")
    assert document["problems"][0]["implementations"][0]["forward"]["runs"] == 3


def counting(counts, name="one", forward=lambda run: 1.0):
    """Return a job that counts its calls, and a stopwatch by which its runs take given times."""

    def call(done):
        counts[name] = counts.get(name, 0) + 1

    def stopwatch(step):
        step()
        return measure.Timing(forward(counts[name])), None

    return measure.Job(name, "numpy", lambda: None, {"forward": call}), stopwatch


def runs_of(forward, **kwargs):
    """Return the timings of a job whose run of a number takes a given time."""
    job, stopwatch = counting({}, forward=forward)
    (outcome,) = measure.compare([job], stopwatch=stopwatch, advance=lambda _: None, **kwargs)
    return outcome.passes["forward"].seconds


LIMITS = {"runs": 50, "max_seconds": 1e9}


def test_runs_go_on_until_the_median_is_steady():
    assert len(runs_of(lambda run: 1.0, until_steady=True, **LIMITS)) == measure.STEADY_RUNS
    # A few outliers move no median; a machine that becomes slower does until it is so for long.
    outliers = runs_of(lambda run: 9.0 if run % 5 == 0 else 1.0, until_steady=True, **LIMITS)
    assert len(outliers) == measure.STEADY_RUNS
    slower = runs_of(lambda run: 1 + 0.05 * min(run, 10), until_steady=True, **LIMITS)
    assert measure.STEADY_RUNS < len(slower) < LIMITS["runs"]
    assert len(runs_of(lambda run: 1 + 0.05 * run, until_steady=True, **LIMITS)) == LIMITS["runs"]


def test_runs_that_are_given_are_all_made():
    assert len(runs_of(lambda run: 1.0, **LIMITS)) == LIMITS["runs"]


def test_all_passes_must_be_steady():
    steady, drifting = [1.0] * 40, [1 + 0.05 * run for run in range(40)]
    assert measure.is_steady([steady, steady])
    assert not measure.is_steady([steady, drifting])
    assert not measure.is_steady([steady[: measure.STEADY_RUNS - 1]])


def test_the_first_call_is_timed_apart_and_before_all_checks():
    job, stopwatch = counting({}, forward=lambda run: 100.0 if run == 1 else 1.0)
    checked = []

    def mistake():
        checked.append(True)

    def watched(step):
        timing, result = stopwatch(step)
        return timing._replace(seconds=timing.seconds if checked else 7.0), result

    (outcome,) = measure.compare(
        [job._replace(mistake=mistake)], stopwatch=watched, advance=lambda _: None,
        runs=3, max_seconds=1e9,
    )  # fmt: skip
    assert outcome.passes["forward"].first_seconds == 7.0
    assert outcome.passes["forward"].seconds == [1.0] * 3


def test_a_first_call_on_a_gpu_takes_what_its_launch_took():
    job, _ = counting({})
    (outcome,) = measure.compare(
        [job], stopwatch=lambda step: (measure.Timing(1.0, 5.0), step()), advance=lambda _: None,
        runs=1, max_seconds=1e9,
    )  # fmt: skip
    assert outcome.passes["forward"].first_seconds == 5.0


def test_what_fails_at_its_first_call_leaves_the_others():
    def failing(done):
        raise ValueError("no such device")

    good, stopwatch = counting({}, "good")
    bad = measure.Job("bad", "numpy", lambda: None, {"forward": failing})
    outcomes = measure.compare(
        [bad, good], stopwatch=stopwatch, advance=lambda _: None, runs=1, max_seconds=1e9
    )
    assert [one.status for one in outcomes] == ["failed", "timed"]
    assert outcomes[0].reason == "ValueError: no such device"


@pytest.mark.parametrize(
    ("seconds", "is_noisy"),
    [([1.0, 1.0, 1.0, 1.0, 9.0], False), ([1.0, 1.0, 1.05, 1.2, 1.3], True), ([1.0], False)],
)
def test_wide_quartiles_are_warned_of(seconds, is_noisy):
    step = report.statistics(seconds)
    problem = {"implementations": [{"name": "one", "forward": step}]}
    assert len(report.noise(problem)) == is_noisy
    assert all("forward of one" in text for text in report.noise(problem))


LAYER = options.Problem("", (2, 3, 8, 9), Layer(Geometry(patch_size=3)))
LOOKUP = options.LookupProblem("", (2, 3, 8, 9), Lookup(1, 2))


@pytest.mark.parametrize("problem", [LAYER, LOOKUP], ids=["volume", "lookup"])
def test_floors_multiply_and_move_as_much_as_the_problem(problem, monkeypatch):
    amounts = floors.work(problem, "float32")
    done = {"multiply_adds": 0, "bytes": 0}
    matmul, copyto = np.matmul, np.copyto

    def multiplied(one, two, out):
        done["multiply_adds"] += one.shape[0] * one.shape[1] * two.shape[1]
        return matmul(one, two, out=out)

    def copied(target, source):
        done["bytes"] += target.nbytes + source.nbytes
        return copyto(target, source)

    monkeypatch.setattr(np, "matmul", multiplied)
    monkeypatch.setattr(np, "copyto", copied)
    for step in measure.PASSES:
        done.update(dict.fromkeys(done, 0))
        for job in floors.jobs(problem, "float32", "cpu"):
            job.steps[step]({})
        for what, amount in done.items():
            assert amount == pytest.approx(amounts[what][step], rel=0.03)
        assert done["multiply_adds"] >= amounts["multiply_adds"][step]


def test_a_copy_on_several_threads_is_whole(monkeypatch):
    monkeypatch.setattr(floors, "WORTH_THREADS", 0)
    monkeypatch.setattr(floors, "Team", lambda size, _: threads.Team(threads.WORTH_THREADS, 3))
    targets = []
    monkeypatch.setattr(np, "empty", lambda *a: targets.append(np.zeros(*a)) or targets[-1])
    copies = floors._copies({"forward": 2 * 1001, "backward": 2 * 2003}, "numpy")
    for step, count in (("forward", 1001), ("backward", 2003)):
        copies[step]({})
        assert targets[0].sum() == count


MACHINE = {"load": 1.0, "cores": 2, "blas": ["openblas Prescott"]}
RATES = {"matmul_flops": 150e9, "sum_flops": 19e9}


@pytest.mark.parametrize(
    ("machine", "rates", "variable", "said"),
    [
        ({}, {}, "", []),
        ({"load": None}, {}, "", []),
        ({"load": 2.5}, {}, "", ["the load is 2.5 on 2 cores"]),
        ({}, {}, "Nehalem", ["OPENBLAS_CORETYPE=Nehalem keeps"]),
        ({}, {"matmul_flops": 43e9}, "", ["BLAS (openblas Prescott) is slow: 43.0 GFLOP/s on"]),
        ({"load": 9.0}, {"matmul_flops": 2e9}, "Core2", ["the load", "OPENBLAS", "is slow"]),
    ],
)
def test_a_busy_machine_and_a_crippled_blas_are_warned_of(
    monkeypatch, machine, rates, variable, said
):
    monkeypatch.setenv("OPENBLAS_CORETYPE", variable)
    texts = floors.warnings(MACHINE | machine, RATES | rates)
    assert len(texts) == len(said)
    assert all(part in text for part, text in zip(said, texts, strict=True))


def test_warnings_about_the_machine_are_shown_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(floors, "core_rates", lambda: RATES | {"matmul_flops": 2e9})
    out, document = measured(tmp_path, *SMALL, "-r", "1")
    assert any("is slow: 2.0 GFLOP/s" in text for text in document["warnings"])
    assert all(f"Warning: {text}\n" in out for text in document["warnings"])
    assert document["core"]["matmul_flops"] == 2e9


@pytest.mark.parametrize(("share", "shown"), [(0.1234, "12.3%"), (1.0, "100.0%"), (1.2, ">100%")])
def test_a_floor_that_took_longer_is_no_share(share, shown):
    assert report._share(share) == shown


def test_rates_of_a_core_are_those_of_what_is_computed(monkeypatch):
    timings = iter([3.0] * 15 + [0.5] * 15)

    def taken(call):
        call()
        return measure.Timing(next(timings)), None

    monkeypatch.setattr(floors, "by_clock", taken)
    assert floors.core_rates() == {
        "matmul_flops": 2 * floors.PROBE**3 / 3.0, "sum_flops": 2048 * 1000 / 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sweep", "field", "values"),
    [
        ("patch=3,1x5", "patch_size", [[3, 3], [1, 5]]),
        ("--patch-size=3,5", "patch_size", [[3, 3], [5, 5]]),
        ("s=1,2", "stride", [[1, 1], [2, 2]]),
        ("first-displacement=-1,0x-2", "first_displacement", [[-1, -1], [0, -2]]),
    ],
)
def test_a_sweep_measures_a_problem_for_each_value(tmp_path, sweep, field, values):
    out, document = measured(tmp_path, *SMALL, "-r", "1", "--sweep", sweep)
    problems = document["problems"]
    assert [one["geometry"][field] for one in problems] == values
    assert len({one["sweep"]["parameter"] for one in problems}) == 1
    for one in problems:
        assert f"{one['name']}: maps" in out
        assert one["shape"] == [1, 3, 12, 11]
        assert one["implementations"][0]["status"] == "timed"


def test_a_sweep_over_sizes_and_presets(tmp_path):
    words = ["--engine", "numpy", "-r", "1", "-c", "2", "-b", "1", "--sweep", "size=9x8,10"]
    words += ["--preset", "pwc-l6", "--preset", "raft-small", "--levels", "2"]
    outcome = invoke("bench", "cpu", *words)
    assert outcome.exit_code == 2
    assert "--levels is for the lookup" in outcome.stderr
    _, document = measured(tmp_path, *words[:-2])
    assert [(one["name"], one["shape"]) for one in document["problems"]] == [
        ("pwc-l6, size=9x8", [1, 2, 9, 8]), ("pwc-l6, size=10", [1, 2, 10, 10]),
        ("raft-small, size=9x8", [1, 2, 9, 8]), ("raft-small, size=10", [1, 2, 10, 10]),
    ]  # fmt: skip
    assert document["problems"][0]["sweep"] == {"parameter": "size", "value": [9, 8]}


def test_the_values_of_a_sweep_take_turns(monkeypatch):
    right, order = measure.ours, []

    def ours(library):
        one = right(library)

        def correlate(*arguments):
            order.append(arguments[-1].geometry.patch_size[0])
            return one.correlate(*arguments)

        return one._replace(correlate=correlate)

    monkeypatch.setattr(measure, "ours", ours)
    monkeypatch.setattr(measure, "SETTLE_SECONDS", 0)
    outcome = invoke("bench", "cpu", *SMALL, "--sweep", "patch=1,3,5", "-r", "4")
    assert outcome.exit_code == 0
    assert order[-12:] == [1, 3, 5] * 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "colour=1"], "'colour' is not one of b, batch-size, "),
        (["--sweep", "patch"], "is neither an int nor two ints"),
        (["--sweep", "patch=1,two"], "'two' is neither an int nor two ints"),
        (["--sweep", "c=1,x"], "is not a valid integer range"),
        (["--sweep", "patch=1,0"], "options, patch=0: patch_size must be at least 1"),
        (["--sweep", "levels=1,2"], "--levels is for the lookup"),
        (["--sweep", "size=1x2x3"], "neither an int nor two ints"),
        (["--images", __file__, __file__, "--sweep", "size=9"], "--sweep size is not for --images"),
    ],
)
def test_a_sweep_over_what_is_not_there_is_refused(words, message):
    outcome = invoke("bench", "cpu", *SMALL, *words)
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.stderr.split())


def test_what_a_sweep_holds_at_once_must_fit_into_memory(monkeypatch):
    needed = []
    monkeypatch.setattr(
        environment, "require_memory", lambda what, count: needed.append((what, count))
    )
    words = ["bench", "cpu", *SMALL, "-r", "1"]
    assert invoke(*words, "--sweep", "b=1,2").exit_code == 0
    assert invoke(*words, "-b", "1").exit_code == 0
    assert invoke(*words, "-b", "2").exit_code == 0
    (what, both), (_, one), (_, two) = needed
    assert both == one + two
    assert what.endswith("and 1 more,")


def test_presets_are_the_published_layers(tmp_path):
    _, document = measured(tmp_path, *SMALL[-4:], "--preset", "pwc-l6", "-r", "1")
    assert document["problems"][0]["shape"] == [8, 196, 8, 14]
    flownetc = bench_module.PRESETS["flownetc"]
    assert flownetc == {
        "batch_size": 4, "channel": 256, "height": 48, "width": 64, "patch": 21,
        "patch_dilation": 2,
    }  # fmt: skip


def test_options_override_a_preset_only_where_given(tmp_path):
    words = ["--preset", "pwc-l6", "--preset", "k3-dense", "-b", "1", "-c", "2", "-r", "1"]
    _, document = measured(tmp_path, *words, "--engine", "numpy")
    first, second = document["problems"]
    assert (first["name"], second["name"]) == ("pwc-l6", "k3-dense")
    assert first["shape"] == [1, 2, 8, 14]
    assert first["description"] == "Geometry(patch_size=9)"
    assert second["description"] == "Geometry(kernel_size=3, patch_size=9, padding=1)"


@pytest.mark.parametrize("preset", bench_module.PRESETS)
def test_a_preset_fits_its_maps(preset):
    sizes = bench_module.Sizes(dict.fromkeys(bench_module.PRESETS), frozenset())
    problem = sizes.problem(preset, bench_module.PRESETS[preset])
    assert min(problem.cost_shape) >= 1


@pytest.mark.parametrize(
    ("name", "case", "dtype", "similarity"),
    [
        (name, case, dtype, similarity)
        for name, peer in peers.PEERS.items()
        for case, (shape, geometry) in GEOMETRIES.items()
        for dtype in ("float64", "bfloat16")
        for similarity in ("product", "l1")
        if peer.cpu and peer.unable(shape, geometry, dtype, "cpu") is None
        if similarity == "product" or peer.l1
    ],
)
def test_a_peer_agrees_with_ours_wherever_it_applies(name, case, dtype, similarity):
    peer, (shape, geometry) = peers.PEERS[name], GEOMETRIES[case]
    missing = peers.missing(peer, similarity)
    if missing is not None:
        pytest.skip(missing)
    problem = bench_module.Problem(case, shape, Layer(geometry, similarity))
    one = measure.Implementation(name, "torch", peer.correlate)
    reference = measure._reference(problem, dtype)
    assert measure._mistake(one, problem, dtype, lambda: reference) is None


@pytest.mark.parametrize("similarity", ["product", "l1"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_maps_of_the_comparison_have_sums_that_16_bits_hold(dtype, similarity):
    problem = bench_module.Problem(
        "", (1, 300, 20, 20), Layer(Geometry(3, 9, padding=1), similarity)
    )
    exact, results = measure._reference(problem, dtype)
    for array in (*exact, *results):
        assert np.abs(array).max() < 256
        assert array.any()


def test_bench_measures_absolute_differences_against_those_of_others(tmp_path):
    pytest.importorskip("torch")
    out, document = measured(tmp_path, *SMALL, "--similarity", "l1", "--against", "all")
    (problem,) = document["problems"]
    assert problem["similarity"] == "l1"
    status = {one["name"]: one["status"] for one in problem["implementations"]}
    assert status["cupycorr numpy"] == status["torch-slices"] == status["torch-unfold"] == "timed"
    assert "torch-all-pairs: skipped: has products only" in out


def test_a_wrong_peer_is_reported_and_not_timed(tmp_path, monkeypatch):
    pytest.importorskip("torch")

    def shifted(fmap1, fmap2, geometry):
        return peers.slices(fmap1, fmap2, geometry).roll(1, -1)

    peer = peers.PEERS["torch-slices"]._replace(correlate=shifted)
    monkeypatch.setitem(peers.PEERS, "torch-slices", peer)
    out, document = measured(tmp_path, *SMALL, "--against", "torch-slices")
    assert re.search(r"^torch-slices: wrong: cost: \d+ of \d+ values differ", out, re.MULTILINE)
    assert "torch-slices  Forward" not in out
    assert document["problems"][0]["implementations"][1]["status"] == "wrong"


def test_a_failing_peer_is_reported_and_the_rest_is_timed(tmp_path, monkeypatch):
    pytest.importorskip("torch")

    def failing(fmap1, fmap2, geometry):
        raise RuntimeError("out of\nluck")

    peer = peers.PEERS["torch-slices"]._replace(correlate=failing)
    monkeypatch.setitem(peers.PEERS, "torch-slices", peer)
    out, _ = measured(tmp_path, *SMALL, "--against", "torch-slices")
    assert "torch-slices: failed: RuntimeError: out of luck" in out
    assert "cupycorr numpy  Forward" in out


def test_a_wrong_result_of_ours_makes_bench_exit_1(monkeypatch):
    pytest.importorskip("torch")

    right = measure.ours

    def doubled(fmap1, fmap2, layer):
        return 2 * cupycorr.correlation(fmap1, fmap2, layer.geometry)

    monkeypatch.setattr(measure, "ours", lambda *asked: right(*asked)._replace(correlate=doubled))
    outcome = invoke("bench", "cpu", *SMALL, "--engine", "torch")
    assert outcome.exit_code == 1
    assert "cupycorr torch: wrong: cost" in outcome.stdout


def test_a_peer_that_needs_too_much_memory_is_skipped_with_the_reason(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(peers, "available_memory", lambda: 1000)
    out, _ = measured(tmp_path, *SMALL, "--against", "torch-unfold", "--against", "torch-all-pairs")
    assert re.search(r"^torch-unfold: skipped: needs .* GB", out, re.MULTILINE)
    assert re.search(r"^torch-all-pairs: skipped: needs .* GB", out, re.MULTILINE)


def test_memory_that_the_system_would_give_up_counts_as_free(tmp_path, monkeypatch):
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:       24683692 kB\nMemFree:  5 kB\nMemAvailable:   23939456 kB\n")
    monkeypatch.setattr(environment, "MEMORY", told)
    assert environment.available_memory() == 23939456 * 1024
    pages = {"SC_AVPHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    told.write_text("MemTotal:       24683692 kB\n")  # by an old kernel
    assert environment.available_memory() == 3 * 4096
    told.unlink()
    assert environment.available_memory() == 3 * 4096


def test_a_problem_larger_than_memory_is_refused(monkeypatch):
    monkeypatch.setattr(environment, "available_memory", lambda: 1000)
    outcome = invoke("bench", "cpu", *SMALL)
    assert outcome.exit_code == 2
    assert "GB of free memory" in outcome.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "cpu", *SMALL, "--against", "torch-slices"], "needs torch, not installed"),
        (["bench", "cpu", "--engine", "torch"], "needs torch, not installed"),
        (["bench", "cpu", "--engine", "numpy", "-d", "bfloat"], "needs ml_dtypes"),
        (["gradcheck", "cpu", "--engine", "torch"], "needs torch"),
        (["gradcheck", "cpu", "--dtype", "bfloat16"], "needs ml_dtypes"),
    ],
)
def test_a_missing_library_that_was_asked_for_ends_the_command(monkeypatch, words, message):
    monkeypatch.setattr(environment, "has", lambda module: False)
    monkeypatch.setattr(peers, "has", lambda module: False)
    outcome = invoke(*words)
    assert outcome.exit_code == 2
    assert message in outcome.stderr


def test_all_peers_are_skipped_where_torch_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "has", lambda module: False)
    monkeypatch.setattr(peers, "has", lambda module: False)
    out, _ = measured(tmp_path, *SMALL[:-4], "-r", "1", "--against", "all")
    assert "torch-slices: skipped: needs torch, not installed" in out
    assert "cupycorr numpy  Forward" in out


def test_images_become_the_maps_that_are_measured(tmp_path):
    data = pytest.importorskip("skimage").data_dir
    pair = [str(Path(data, f"motorcycle_{side}.png")) for side in ("left", "right")]
    words = ["--preset", "stereo", "-c", "5", "--downscale", "8", "-r", "1", "--engine", "numpy"]
    _, document = measured(tmp_path, "--images", *pair, *words)
    (problem,) = document["problems"]
    assert document["input"] == {"images": pair, "downscale": 8}
    assert problem["shape"] == [1, 5, 500 // 8, 741 // 8]
    assert problem["implementations"][0]["status"] == "timed"


def test_feature_maps_of_the_stereo_pair_match_at_its_disparity():
    data = pytest.importorskip("skimage").data_dir
    pair = features.load_pair(*(Path(data, f"motorcycle_{s}.png") for s in ("left", "right")))
    maps = features.feature_maps(*pair, 33, 4)
    cost = cupycorr.correlation(*maps, Geometry(patch_size=(1, 41)))
    displacements = cost[0, 0].argmax(0) - 20
    # The right camera sees everything further left: of 41 displacements those from 1 to 16
    # positions (its disparities are 7 to 61 pixels) must hold most of the best matches.
    assert np.mean((displacements <= -1) & (displacements >= -16)) > 0.6


def test_feature_maps_are_deterministic_and_normalized():
    image = np.random.default_rng(0).random((40, 52), np.float32)
    once, twice = features.feature_maps(image, image, 20, 4)
    assert once.shape == (1, 20, 10, 13)
    assert verify.difference(once, twice) is None
    assert np.abs(once.mean((0, 2, 3))).max() < 1e-5
    assert once.std((0, 2, 3)) == pytest.approx(1, rel=1e-5)


def test_gradcheck_refuses_what_does_not_fit_into_memory():
    outcome = invoke("gradcheck", "cpu", "--height", 3000, "-w", 3000, "-c", 2000)
    assert outcome.exit_code == 2
    assert "needs about" in outcome.stderr
    assert not outcome.stdout


def test_all_dtypes_are_those_that_there_are(monkeypatch):
    present = environment.has
    monkeypatch.setattr(environment, "has", lambda name: name != "ml_dtypes" and present(name))
    outcome = invoke("gradcheck", "cpu", "--engine", "numpy", "--dtype", "all")
    assert outcome.exit_code == 0, outcome.output
    assert "left out  numpy bfloat16: " in outcome.stdout
    assert "pip install ml_dtypes" in outcome.stdout
    assert "numpy float16: " in outcome.stdout


def test_images_of_any_mode_are_read(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGBA", (7, 6), (255, 0, 0, 9)).save(tmp_path / "a.png")
    image.new("P", (7, 6)).save(tmp_path / "b.png")
    one, two = features.load_pair(tmp_path / "a.png", tmp_path / "b.png")
    assert one.shape == two.shape == (6, 7)
    assert one.max() == pytest.approx(0.299 * 255, abs=1)


def test_images_of_different_sizes_are_refused(tmp_path):
    image = pytest.importorskip("PIL.Image")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, size in zip(files, ((9, 6), (7, 8)), strict=True):
        image.new("L", size).save(file)
    outcome = invoke("bench", "cpu", *SMALL, "--images", *files)
    assert outcome.exit_code == 2
    assert "A and B must have equal sizes, got 9 x 6 and 7 x 8 pixels" in outcome.stderr


def test_a_file_that_is_no_image_ends_the_command(tmp_path):
    file = tmp_path / "no.png"
    file.write_text("no image")
    outcome = invoke("bench", "cpu", *SMALL, "--images", file, file)
    assert outcome.exit_code == 2
    assert "cannot read" in outcome.stderr


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_peak_of_memory_counts_what_is_held_at_once(library):
    empty = np.empty
    if library == "torch":
        empty = pytest.importorskip("torch").empty

    def call():
        held = empty(4_000_000)  # 32 MB, or 16 MB in torch's default dtype
        freed = empty(4_000_000)
        del freed
        return held, empty(2_000_000)

    peak, kept = memory.peak(call, library)
    held = 2 * kept[0].nbytes
    assert held <= peak < held + 1_000_000


def test_extra_memory_leaves_out_the_results():
    geometry, maps = Geometry(patch_size=31), measure.random_maps((1, 1, 30, 40), "float32")
    cost = np.ones(geometry.cost_shape(maps[0].shape), np.float32)
    one = measure.ours("numpy")._replace(correlate=lambda *_: cost.copy())
    steps = measure._steps(one, measure._Maps(*maps, cost), Layer(geometry))
    job = measure.Job(one.name, one.library, lambda: None, steps)
    extra, outputs = measure._memory(job)["forward"]
    assert extra < cost.nbytes / 10
    assert outputs == cost.nbytes


def test_threads_are_limited_and_given_back():
    torch = pytest.importorskip("torch")
    import threadpoolctl

    before = torch.get_num_threads()
    with measure.threads(1, torch_too=True):
        assert torch.get_num_threads() == 1
        assert {pool["num_threads"] for pool in threadpoolctl.threadpool_info()} == {1}
    assert torch.get_num_threads() == before


def test_piped_output_is_plain_and_standard_error_silent():
    outcome = installed("bench", "cpu", *SMALL[:-2], "-r", "1")
    assert outcome.returncode == 0
    assert outcome.stderr == ""
    assert "\x1b" not in outcome.stdout
    assert "cupycorr numpy  Forward: " in outcome.stdout


def test_a_command_that_fails_prints_no_traceback():
    outcome = installed("gradcheck", "cpu", "--height", "1")
    assert outcome.returncode == 2
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("Error: ")


def test_progress_shows_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with bench_module.progress.bar("layer", 2) as advance:
        advance(1, "one")
    assert "layer" in capsys.readouterr().err


CRASHES = {
    "a signal": "os.kill(os.getpid(), signal.SIGSEGV)",
    "an exit": "print('[\"timed\"'); sys.stderr.write('no such luck\\n'); os._exit(7)",
    "an exit without an error": "os._exit(0)",
    "an exception": "raise RuntimeError('no such luck')",
    "a wrong result": "return right(*arguments, **options).roll(1, -1)",
    "a right result": "return right(*arguments, **options)",
}
SAMPLER = """
import os, signal, sys
from cupycorr import spatial_correlation_sample as right

def spatial_correlation_sample(*arguments, **options):
    {}
"""


@pytest.mark.parametrize("crash", CRASHES)
def test_a_peer_that_ends_its_process_costs_nobody_elses_row(tmp_path, crash):
    pytest.importorskip("torch")
    (tmp_path / "spatial_correlation_sampler.py").write_text(SAMPLER.format(CRASHES[crash]))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    words = [*SMALL[:-2], "-r", "1", "--against", "spatial-correlation-sampler", "--json", "-"]
    done = installed("bench", "cpu", *words, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    ours, other = json.loads(done.stdout)["problems"][0]["implementations"]
    assert ours["status"] == "timed"
    wanted = {
        "a signal": ("failed", "ended its process with status -11: "),
        "an exit": ("failed", "ended its process with status 7: no such luck"),
        "an exit without an error": ("failed", "ended its process with status 0: "),
        "an exception": ("failed", "RuntimeError: no such luck"),
        "a wrong result": ("wrong", "cost: "),
        "a right result": ("timed", ""),
    }[crash]
    assert (other["status"], other.get("reason", "")[: len(wanted[1])]) == wanted
