"""The command line on CUDA devices; what needs none runs everywhere."""

import json
import os
import subprocess
import sys

import click
import numpy as np
import pytest
from command import installed, invoke, main
from cupycorr.cli import cuda, environment, options
from cupycorr.cli.bench import measure, memory, peers, report

import cupycorr
from cupycorr import Geometry
from cupycorr.layer import DTYPES, Layer

bench_module = sys.modules["cupycorr.cli.bench.command"]
FINDINGS = {
    "NVIDIA driver": environment.Finding("NVIDIA driver", False, "no library", "Install it."),
    "CuPy": environment.Finding("CuPy", False, "not installed", "Get CuPy."),
    "NVRTC": environment.Finding("NVRTC", False, "not found", "Get NVRTC."),
    "GPU": environment.Finding("GPU", False, "no device", "Look for one."),
}
COMMANDS = {"bench": ["bench", "cuda"], "gradcheck": ["gradcheck", "cuda"], "warmup": ["warmup"]}
SMALL = ["-b", "1", "-c", "3", "--height", "6", "-w", "5"]
TIMED = ["bench", "cuda", *SMALL, "-r", "3", "--patch", "2"]
A100 = {
    "ClockRate": 1_410_000, "MultiProcessorCount": 108, "MemoryClockRate": 1_215_000,
    "GlobalMemoryBusWidth": 5120, "SingleToDoublePrecisionPerfRatio": 2,
}  # fmt: skip
gpu = pytest.mark.gpu


@pytest.fixture
def _no_cuda(monkeypatch):
    monkeypatch.setattr(environment, "cuda_findings", lambda: list(FINDINGS.values()))


def planted(monkeypatch, what):
    """Make the CUDA engine's array of a name wrong in one element."""
    from cupycorr.cuda import engine as cuda_engine

    right = cuda_engine.run

    def wrong(asked, arrays, *args, **kwargs):
        right(asked, arrays, *args, **kwargs)
        if what in arrays:
            arrays[what][(0,) * arrays[what].ndim] += 1

    monkeypatch.setattr(cuda_engine, "run", wrong)


def measured(tmp_path, *words):
    file = tmp_path / "bench.json"
    outcome = invoke(*words, "--json", file)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout, json.loads(file.read_text())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("missing", FINDINGS)
def test_a_command_names_all_that_cuda_needs_and_remedies_what_is_missing(
    monkeypatch, command, missing
):
    findings = [one._replace(found=one.name != missing) for one in FINDINGS.values()]
    monkeypatch.setattr(environment, "cuda_findings", lambda: findings)
    outcome = invoke(*COMMANDS[command])
    assert outcome.exit_code == 2
    for name, finding in FINDINGS.items():
        state = "not ok" if name == missing else "ok    "
        assert f"{state}  {name}: {finding.detail}" in outcome.stderr
        assert (finding.remedy in outcome.stderr) == (name == missing)


def test_cuda_is_not_refused_where_nothing_is_missing(monkeypatch):
    findings = [one._replace(found=True) for one in FINDINGS.values()]
    monkeypatch.setattr(environment, "cuda_findings", lambda: findings)
    assert environment.require_cuda() is None


def test_findings_are_looked_for_in_the_order_of_need():
    assert [finding.name for finding in environment.cuda_findings()] == list(FINDINGS)


def test_a_missing_library_is_a_finding_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(environment.ctypes, "CDLL", _not_loadable)
    findings = environment.cuda_findings()
    assert not any(finding.found for finding in findings)
    assert all(finding.remedy for finding in findings[:2])


def _not_loadable(name):
    raise OSError(name)


def test_nvrtc_is_what_cupy_loads(monkeypatch):
    cuda = pytest.importorskip("cupy").cuda
    nvrtc = cuda.nvrtc
    monkeypatch.setattr(cuda.runtime, "runtimeGetVersion", lambda: 12090)
    monkeypatch.setattr(nvrtc, "getVersion", lambda: (12, 9))
    assert environment._nvrtc(cupy_found=True) == ("NVRTC", True, "12.9", "")
    monkeypatch.setattr(nvrtc, "getVersion", lambda: _not_loadable("no\nlibnvrtc"))
    finding = environment._nvrtc(cupy_found=True)
    assert not finding.found
    assert "no libnvrtc" in finding.detail
    assert finding.remedy == "pip install nvidia-cuda-nvrtc-cu12"


def with_path(folder):
    """Return an environment in which a folder comes first where modules are looked for."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}


@pytest.mark.parametrize(
    ("cupy", "said", "remedies"),
    [
        ("__version__ = '13.6.0'", ": cupycorr needs CuPy >= 14, this is 13.6.0; pip install",
         ["cupycorr[cuda12]"]),
        ("raise PermissionError(13, 'Permission denied', '/cache')",
         "cannot be used: [Errno 13] Permission denied: '/cache'\n", ["CUPY_CACHE_DIR"]),
        ("raise ImportError('libcublas.so.12 is not there')",
         "cannot be used: libcublas.so.12 is not there\n", []),
        ("import of_no_such_name", "cannot be used: No module named 'of_no_such_name'\n", []),
    ],
    ids=["old", "no cache", "no library", "no module"],
)  # fmt: skip
def test_a_cupy_that_cannot_be_used_is_not_called_missing(tmp_path, cupy, said, remedies):
    (tmp_path / "cupy.py").write_text(cupy)
    done = installed("warmup", env=with_path(tmp_path))
    assert done.returncode == 2
    assert said in done.stderr
    known = ("cupycorr[cuda12]", "cupy-cuda12x", "CUPY_CACHE_DIR", "nvidia-cuda-nvrtc")
    assert [remedy for remedy in known if remedy in done.stderr] == remedies
    assert "missing" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_cache_that_cannot_be_made_is_told_with_its_path(tmp_path, command):
    pytest.importorskip("cupy")
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "cache")
    done = installed(*COMMANDS[command], env=os.environ | {"CUPY_CACHE_DIR": cache})
    assert done.returncode == 2
    assert f"Not a directory: {cache!r}\n          Set CUPY_CACHE_DIR to a folder" in done.stderr
    assert "pip install" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "name", ["cuda.runtime.CUDARuntimeError", "cuda.memory.OutOfMemoryError",
             "cuda.compiler.CompileException"],
)  # fmt: skip
def test_an_error_of_cupy_ends_a_command_with_one_line(monkeypatch, command, name):
    kind = pytest.importorskip("cupy")
    for part in name.split("."):
        kind = getattr(kind, part)
    arguments = {"CUDARuntimeError": (2,), "OutOfMemoryError": (9, 0)}
    error = kind(*arguments.get(kind.__name__, ("line one:\nline two", "", "", ())))
    assert _ended(monkeypatch, command, error) == f"Error: {' '.join(str(error).split())}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_of_the_engine_ends_a_command_with_one_line(monkeypatch, command):
    pytest.importorskip("cupy")
    from cupycorr.cuda import engine as cuda_engine

    assert _ended(monkeypatch, command, cuda_engine.Unusable("no\ncache")) == "Error: no cache\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_other_errors_keep_their_traceback(monkeypatch, command):
    with pytest.raises(ZeroDivisionError):
        _ended(monkeypatch, command, ZeroDivisionError())


def _ended(monkeypatch, command, error):
    """Return what a command writes to stderr if its first question to the device fails."""

    def fail(*args):
        raise error

    monkeypatch.setattr(environment, "require_cuda", lambda: None)
    monkeypatch.setattr(cuda, "device", fail)
    monkeypatch.setattr(cuda, "refuse_too_large", fail)
    outcome = invoke(*COMMANDS[command])
    assert outcome.exit_code == 1
    return outcome.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "cpu", "--engine", "cupy"], "--engine on cpu must be numpy or torch, got cupy"),
        (["gradcheck", "cpu", "--engine", "plain"], "must be numpy or torch, got plain"),
        (["bench", "cuda", "--engine", "numpy"], "must be cupy or plain or torch, got numpy"),
        (["gradcheck", "cuda", "--engine", "numpy"], "must be cupy or plain or torch, got numpy"),
        (["bench", "cpu", "--cold"], "--cold is for cuda, got cpu"),
        (["bench", "cuda", "--threads", "2"], "--threads is for cpu, got cuda"),
    ],
)
@pytest.mark.usefixtures("_no_cuda")
def test_options_that_a_device_does_not_have_are_refused_before_it_is_looked_for(words, message):
    outcome = invoke(*words)
    assert outcome.exit_code == 2
    assert message in outcome.stderr


ARGUMENTS = {"device": "cuda", "dtype": "float32", "similarity": "product"}


@pytest.mark.parametrize(("engines", "against"), [(("torch",), ()), ((), ("torch-slices",))])
def test_what_needs_a_gpu_of_torch_is_refused_where_it_was_asked_for(monkeypatch, engines, against):
    for module in (environment, peers):
        monkeypatch.setattr(module, "has", lambda module: True)
        monkeypatch.setattr(module, "torch_finds_cuda", lambda: False)
    with pytest.raises(environment.Unavailable, match=r"needs a torch that finds the GPU$"):
        bench_module._implementations(engines=engines, against=against, **ARGUMENTS)
    present, absent = bench_module._implementations(engines=(), against=("all",), **ARGUMENTS)
    assert [one.name for one in present] == ["cupycorr cupy"]
    assert [one.name for one in absent] == list(bench_module.PEERS)


def test_where_torch_finds_the_gpu_its_tensors_and_all_peers_are_measured(monkeypatch):
    for module in (environment, peers):
        monkeypatch.setattr(module, "torch_finds_cuda", lambda: True)
        monkeypatch.setattr(module, "has", lambda module: True)
    present, absent = bench_module._implementations(engines=(), against=("all",), **ARGUMENTS)
    names = [one.name for one in present]
    assert names == ["cupycorr cupy", "cupycorr torch", *bench_module.PEERS]
    assert not absent


@pytest.mark.parametrize(
    ("geometry", "covered"),
    [
        (Geometry(patch_size=9), True),
        (Geometry(patch_size=21, dilation_patch=2), True),
        (Geometry(patch_size=8), False),
        (Geometry(patch_size=(9, 7)), False),
        (Geometry(patch_size=9, stride=2), False),
        (Geometry(kernel_size=3, patch_size=9), False),
        (Geometry(patch_size=9, padding=1), False),
        (Geometry(patch_size=9, first_displacement=0), False),
    ],
    ids=repr,
)
def test_localcorr_is_asked_only_for_what_it_computes(geometry, covered):
    unable = peers.PEERS["localcorr"].unable
    assert (unable((1, 2, 12, 13), geometry, "float32", "cuda") is None) == covered
    assert unable((1, 2, 12, 13), geometry, "float64", "cuda")


@pytest.mark.parametrize(
    "words",
    [["bench", "cuda", "-d", "bfloat"], ["gradcheck", "cuda", "--dtype", "bfloat16"]],
)
def test_bfloat16_arrays_need_ml_dtypes(monkeypatch, words):
    monkeypatch.setattr(environment, "require_cuda", lambda: None)
    monkeypatch.setattr(environment, "has", lambda module: False)
    outcome = invoke(*words)
    assert outcome.exit_code == 2
    assert "needs ml_dtypes" in outcome.stderr


def test_warmup_takes_the_sizes_and_presets_of_bench():
    commands = {name: main.get_command(click.Context(main), name) for name in ("bench", "warmup")}
    flags = {name: {p.name: p.opts for p in command.params} for name, command in commands.items()}
    shared = [*options.SIZES, *options.LOOKUP, "presets"]
    assert {name: flags["warmup"][name] for name in shared} == {
        name: flags["bench"][name] for name in shared
    }
    assert flags["warmup"]["dtypes"] == flags["bench"]["dtype"]


@pytest.mark.parametrize(
    ("changes", "capability", "peaks"),
    [
        ({}, 80, (108 * 64 * 1.41e9, 108 * 32 * 1.41e9, 1555.2e9)),
        ({}, 90, (108 * 128 * 1.41e9, 108 * 64 * 1.41e9, 1555.2e9)),
        ({"SingleToDoublePrecisionPerfRatio": 64}, 89,
         (108 * 128 * 1.41e9, 108 * 2 * 1.41e9, 1555.2e9)),
        ({}, 999, (None, None, 1555.2e9)),
        ({"ClockRate": 0}, 80, (None, None, 1555.2e9)),
        ({"MemoryClockRate": 0}, 80, (108 * 64 * 1.41e9, 108 * 32 * 1.41e9, None)),
    ],
)  # fmt: skip
def test_peaks_are_computed_from_the_attributes(changes, capability, peaks):
    assert cuda.peaks(A100 | changes, capability) == pytest.approx(peaks)


def test_attributes_that_are_not_reported_leave_peaks_unknown():
    assert cuda.peaks({"MultiProcessorCount": 1}, 80) == (None, None, None)


COPY = measure.Outcome(
    "copy", "timed",
    passes={name: measure.Measured([measure.Timing(5e-10, 0.0)], 0) for name in measure.PASSES},
)  # fmt: skip


def document(problem, outcomes, dtype="float32", **peaks):
    """Return what `bench cuda` makes of outcomes."""
    found = {"float32": 1e12, "float64": 5e11, "memory": 1e12} | peaks
    entry = report.entry(problem, dtype, outcomes, [COPY])
    return {"device": "cuda", "dtype": dtype, "cuda": {"peaks": found}, "problems": [entry]}


def cells(capsys, written, step):
    """Print the table; return the cells of its only row for a pass."""
    report.show(written, written["problems"][0], "us", "us")
    section = capsys.readouterr().out.split(f"{step} ")[1]
    row = next(line for line in section.splitlines() if line.startswith("cupycorr cupy"))
    return row.removeprefix("cupycorr cupy").split()


@pytest.mark.parametrize(
    ("step", "products", "moved"), [("forward", 120, 4 * 264), ("backward", 240, 4 * 504)]
)
def test_a_table_shows_medians_and_rates_against_the_peaks(
    monkeypatch, capsys, step, products, moved
):
    monkeypatch.setattr(report, "WIDTH", 140)  # room for all columns
    # Maps of 120 elements, of which each is in one product, and a cost volume of 24.
    problem = options.Problem("one", (2, 5, 3, 4), Layer(Geometry()))
    timings = [measure.Timing(s * 1e-9, s * 1e-6) for s in (1, 2, 6)]
    one = measure.Outcome(
        "cupycorr cupy", "timed",
        passes={
            name: measure.Measured(timings, 3_000_000, first_seconds=0.004)
            for name in measure.PASSES
        },
    )  # fmt: skip
    shown = cells(capsys, document(problem, [one]), step)
    assert shown == [
        "0.00100", "0.00200", "0.00150-0.00400", "3",
        report.number(products / 2), f"({products / 20:.0f}%)",
        report.number(moved / 2), f"({moved / 20:.0f}%)",
        "50.0%", "2.000", "3.000", "4000", "1.00",
    ]  # fmt: skip
    assert shown[5] == {"forward": "(6%)", "backward": "(12%)"}[step]
    double = cells(capsys, document(problem, [one], "float64"), step)
    assert double[5] == f"({products / 10:.0f}%)"
    unknown = cells(capsys, document(problem, [one], float32=None, memory=None), step)
    assert unknown[4:6] == [report.number(products / 2), report.number(moved / 2)]


def test_the_document_holds_the_time_of_launching():
    timings = [measure.Timing(2e-6, 3e-5), measure.Timing(4e-6, 5e-5)]
    passes = {name: measure.Measured(timings, 0) for name in measure.PASSES}
    written = report._implementation(measure.Outcome("cupycorr cupy", "timed", passes=passes))
    assert written["forward"]["seconds"] == [2e-6, 4e-6]
    assert written["forward"]["host_seconds"] == [3e-5, 5e-5]


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradcheck_passes_on_the_device(dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    outcome = invoke("gradcheck", "cuda", *SMALL, "--dtype", dtype)
    *lines, count = outcome.stdout.splitlines()[2:]
    assert outcome.exit_code == 0, outcome.output
    assert all(line.startswith("ok ") for line in lines)
    assert count == f"{len(lines)} passed, 0 failed"
    for engine in ("cupy", "plain"):
        assert f"ok      {engine} {dtype}: cost exact on integers (with the definition)" in lines


@gpu
@pytest.mark.parametrize("what", ["cost", "grad_fmap1", "grad_fmap2"])
@pytest.mark.parametrize("engine", ["cupy", "plain"])
def test_gradcheck_fails_on_a_planted_error_on_the_device(monkeypatch, engine, what):
    planted(monkeypatch, what)
    outcome = invoke("gradcheck", "cuda", "--engine", engine, *SMALL)
    assert outcome.exit_code == 1
    for check in ("exact on integers", "round-off"):
        assert f"FAILED  {engine} float64: {what} {check}" in outcome.stdout
    assert f"FAILED  {engine} float64: adjoint identity" in outcome.stdout


@gpu
def test_gradcheck_fails_where_a_kernel_cannot_be_launched(monkeypatch):
    from cupycorr.cuda import engine as cuda_engine

    def refused(*args, **kwargs):
        raise RuntimeError("product_cost must have\nat most 1024 threads")

    monkeypatch.setattr(cuda_engine, "run", refused)
    outcome = invoke("gradcheck", "cuda", "--engine", "plain", *SMALL)
    assert outcome.exit_code == 1
    assert "FAILED  plain float64: kernels (on the device): product_cost must" in outcome.stdout


@gpu
@pytest.mark.parametrize("cold", [False, True])
def test_bench_times_forward_and_backward_on_the_device(tmp_path, cold):
    words = ["--engine", "cupy", "--engine", "plain", "--against", "all"]
    out, written = measured(tmp_path, *TIMED, *words, *(["--cold"] if cold else []))
    assert written["device"] == "cuda"
    assert written["cold"] is cold
    assert written["cuda"]["multiprocessors"] >= 1
    (problem,) = written["problems"]
    assert {kernel["kernel"] for kernel in problem["kernels"]} >= {"product_cost", "taps_sum"}
    for one in problem["implementations"][:2]:
        assert one["status"] == "timed", one
        for step in measure.PASSES:
            assert len(one[step]["seconds"]) == len(one[step]["host_seconds"]) == 3
            assert one[step]["min"] == min(one[step]["seconds"]) > 0
        assert f"{one['name']}  Forward: " in out
    compared = {one["status"] for one in problem["implementations"][2:]}
    assert compared <= ({"timed", "skipped"} if environment.torch_finds_cuda() else {"skipped"})
    tables = out[out.index("forward ") : out.index("cupycorr cupy  Forward")]
    assert max(map(len, tables.splitlines())) <= 100


@gpu
@pytest.mark.parametrize("dtype", ["half", "bfloat", "double"])
def test_bench_takes_every_dtype_on_the_device(tmp_path, dtype):
    pytest.importorskip("ml_dtypes")
    _, written = measured(tmp_path, *TIMED, "-d", dtype)
    assert written["problems"][0]["implementations"][0]["status"] == "timed"


@gpu
@pytest.mark.parametrize("empty", [["-b", "0"], ["-c", "0"]])
def test_bench_takes_empty_maps_on_the_device(tmp_path, empty):
    _, written = measured(tmp_path, *TIMED, *empty)
    assert written["problems"][0]["kernels"] == []


@gpu
def test_a_wrong_result_on_the_device_is_reported_and_not_timed(monkeypatch):
    planted(monkeypatch, "cost")
    outcome = invoke(*TIMED)
    assert outcome.exit_code == 1
    assert "cupycorr cupy: wrong: cost: 1 of " in outcome.stdout


@gpu
def test_images_become_the_maps_that_are_measured_on_the_device(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name in "ab":
        image.effect_noise((40, 24), 50).save(tmp_path / f"{name}.png")
    words = ["--images", tmp_path / "a.png", tmp_path / "b.png", "--preset", "stereo"]
    words += ["-c", "2", "--patch", "1,3", "-r", "1"]
    _, written = measured(tmp_path, "bench", "cuda", *words)
    (problem,) = written["problems"]
    assert problem["shape"] == [1, 2, 6, 10]
    assert problem["implementations"][0]["status"] == "timed"


@gpu
def test_a_problem_larger_than_the_devices_memory_is_refused(monkeypatch):
    monkeypatch.setattr(environment, "available_memory", lambda: 1 << 60)
    outcome = invoke("bench", "cuda", "-b", "1000", "-c", "10000", "--height", "1000", "-w", "99")
    assert outcome.exit_code == 2
    assert "GB of free memory on the device" in outcome.stderr


@gpu
def test_cold_runs_overwrite_more_than_the_cache():
    cupy = pytest.importorskip("cupy")
    assert cuda._flushed_bytes() > cupy.cuda.Device().attributes["L2CacheSize"]


@gpu
def test_the_peak_of_the_devices_memory_counts_what_is_held_at_once():
    cupy = pytest.importorskip("cupy")

    def call():
        held = cupy.empty(1_000_000, np.float32)
        freed = cupy.empty(1_000_000, np.float32)
        del freed
        return held, cupy.empty(1_000_000, np.float32)

    peak, kept = memory.peak(call, "cupy")
    assert sum(one.nbytes for one in kept) <= peak < 9_000_000


@gpu
def test_warmup_prints_what_each_kernel_took_and_takes():
    outcome = invoke("warmup", *SMALL, "-d", "float", "-d", "double")
    assert outcome.exit_code == 0, outcome.output
    for dtype in ("float32", "float64"):
        rows = [line.split() for line in outcome.stdout.splitlines() if line.startswith(dtype)]
        assert "product_cost" in [row[1] for row in rows]
        for _, _, seconds, registers, spilled in rows:
            assert float(seconds) >= 0
            assert int(registers) > 0
            assert int(spilled) >= 0


@gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_warmup_leaves_nothing_for_the_first_call_to_compile(monkeypatch, channels_last):
    cupy = pytest.importorskip("cupy")
    from cupycorr.cuda import engine as cuda_engine

    words = ["-b", "1", "-c", "3", "--height", "8", "-w", "9", "--patch", "2"]
    layout = ["--channels-last"] * channels_last
    assert invoke("warmup", *words, "-d", "half", *layout).exit_code == 0
    monkeypatch.setattr(cuda_engine, "_compile", lambda launch: pytest.fail(launch.kernel))
    problem = options.Sizes(
        {"batch_size": 1, "channel": 3, "height": 8, "width": 9, "patch": 2},
        frozenset({"batch_size", "channel", "height", "width", "patch"}),
    ).problem("", bench_module.PRESETS["default"])
    maps = [cupy.ones(problem.shape, cupy.float16) for _ in range(2)]
    if channels_last:
        maps = [cupy.ascontiguousarray(m.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for m in maps]
    cost = cupycorr.correlation(*maps, problem.layer.geometry)
    cupycorr.correlation_vjp(cost, *maps, problem.layer.geometry)


@gpu
def test_warmup_leaves_nothing_of_tf32_to_compile(monkeypatch):
    cupy = pytest.importorskip("cupy")
    from cupycorr.cuda import engine as cuda_engine

    size = ["-b", "1", "-c", "128", "--height", "24", "-w", "64"]
    words = [*size, "-k", "1", "--patch", "9", "--patch-dilation", "1", "-s", "1", "-p", "0"]
    outcome = invoke("warmup", *words, "-d", "float", "--tf32")
    assert outcome.exit_code == 0
    if int(cupy.cuda.Device().compute_capability) >= 80:
        assert "tensor_gradient" in outcome.stdout
    monkeypatch.setattr(cuda_engine, "_compile", lambda launch: pytest.fail(launch.kernel))
    maps = [cupy.ones((1, 128, 24, 64), cupy.float32) for _ in range(2)]
    cost = cupycorr.correlation(*maps, Geometry(patch_size=9), allow_tf32=True)
    cupycorr.correlation_vjp(cost, *maps, Geometry(patch_size=9), allow_tf32=True)


@gpu
@pytest.mark.parametrize("command", COMMANDS)
def test_a_cache_that_cannot_be_written_costs_a_command_a_warning(tmp_path, command):
    cache = tmp_path / "cache"
    program = (
        "import os, sys\n"
        "import cupy\n"
        f"os.rmdir({str(cache)!r})\n"
        f"open({str(cache)!r}, 'w').close()\n"
        "from cupycorr.cli import main\n"
        "main(prog_name='cupycorr')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *COMMANDS[command], *SMALL, "--patch", "2"],
        capture_output=True, text=True, env=os.environ | {"CUPY_CACHE_DIR": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("Warning: ")]
    assert len(warnings) == len(set(warnings)) > 0
    for warning in warnings:
        assert f"Not a directory: '{cache}" in warning
        assert warning.endswith("; set CUPY_CACHE_DIR to a folder that can be written")
    assert "load(source(" not in done.stderr  # no line of code


@gpu
def test_warmup_ends_with_the_compilers_message(monkeypatch):
    def broken(*args):
        raise RuntimeError("product.cu must compile, got: expected a ';'")

    monkeypatch.setattr(cuda, "kernels", broken)
    outcome = invoke("warmup", *SMALL)
    assert outcome.exit_code == 1
    assert "default" not in outcome.stderr
    assert "options, float32: product.cu must compile, got: expected a ';'" in outcome.stderr
