"""The lookup on the command line: its options, its checks, and what is measured."""

import json
import re

import numpy as np
import pytest
from command import invoke
from cupycorr.cli import cuda, options
from cupycorr.cli.bench import lookups, measure, peers
from cupycorr.cli.presets import PRESETS

from cupycorr import Lookup, sampling
from cupycorr.cpu import lookup as numpy_lookup

SMALL = ["-b", "1", "-c", "4", "--height", "9", "-w", "11", "--radius", "1", "--levels", "2"]
BENCH = ["bench", "cpu", *SMALL, "-r", "1", "--engine", "numpy"]
PROBLEMS = {
    "square": options.LookupProblem("", (2, 5, 9, 10), Lookup(2, 2)),
    "channels last": options.LookupProblem("", (1, 4, 9, 10), Lookup((1, 2), 3, order="xy"), True),
    "stereo": options.LookupProblem("", (2, 3, 5, 16), Lookup((0, 3), 3, pool=(1, 2))),
    "dilated": options.LookupProblem("", (1, 3, 8, 9), Lookup(1, 2, (2, 1))),
}


def measured(tmp_path, *words):
    """Run ``bench cpu`` and return its output and its only problem."""
    file = tmp_path / "bench.json"
    outcome = invoke(*BENCH, *words, "--json", file)
    assert outcome.exit_code == 0, outcome.output
    document = json.loads(file.read_text())
    return outcome.stdout, document, document["problems"][0]


def planted(monkeypatch, what):
    """Make the NumPy engine's array of a name wrong in one element."""
    right = numpy_lookup.run

    def wrong(asked, arrays, *args, **kwargs):
        right(asked, arrays, *args, **kwargs)
        array = arrays.get(what)
        if array is not None:
            array = array[0] if isinstance(array, list) else array
            array[(0,) * array.ndim] += 1

    monkeypatch.setattr(numpy_lookup, "run", wrong)


# Options.


def test_the_radius_turns_a_command_to_the_lookup():
    given = {"batch_size": 1, "channel": 2, "height": 8, "width": 9, "patch_dilation": 2}
    given |= {"radius": (1, 2), "levels": 2, "pool": None, "order": "xy"}
    problem = options.Sizes(given, frozenset(given) - {"patch_dilation"}).problem("one")
    assert problem == options.LookupProblem("one", (1, 2, 8, 9), Lookup((1, 2), 2, order="xy"))
    dilated = options.Sizes(given, frozenset(given)).problem("one")
    assert dilated.lookup == Lookup((1, 2), 2, 2, order="xy")


@pytest.mark.parametrize("command", ["bench", "gradcheck"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--radius", "1", "--patch", "3"], "--patch-size is for the cost volume, not for the"),
        (["--radius", "1", "--similarity", "l1"], "--similarity is for the cost volume"),
        (["--levels", "2"], "--levels is for the lookup: --radius"),
        (["--order", "xy"], "--order is for the lookup: --radius"),
        (["--radius", "-1"], "radius must be at least 0"),
        (["--radius", "1", "--levels", "9"], "every level must have cells"),
        (["--radius", "x"], "'x' is neither an int nor two ints"),
    ],
)
def test_options_of_the_other_kind_and_bad_values_are_refused(command, words, message):
    outcome = invoke(command, "cpu", "--height", "9", "-w", "9", *words)
    assert outcome.exit_code == 2
    assert message in outcome.stderr


def test_presets_are_the_lookups_of_the_networks():
    problems = {
        name: options.Sizes({}, frozenset()).problem(name, PRESETS[name])
        for name in PRESETS
        if name.startswith("raft")
    }
    assert {name: (one.shape, one.lookup) for name, one in problems.items()} == {
        "raft": ((1, 256, 55, 128), Lookup(4, 4, order="xy")),
        "raft-small": ((1, 128, 46, 62), Lookup(3, 4, order="xy")),
        "raft-1080p": ((1, 256, 135, 240), Lookup(4, 4, order="xy")),
        "raft-stereo": ((1, 256, 96, 160), Lookup((0, 4), 4, pool=(1, 2))),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "torch-slices"], "--against torch-slices is for the cost volume"),
        (["--against", "none"], "is not one of"),
    ],
)
def test_others_that_compute_something_else_are_refused(words, message):
    outcome = invoke(*BENCH, *words)
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.stderr.split())


# gradcheck.


def test_gradcheck_passes_in_all_dtypes():
    outcome = invoke("gradcheck", "cpu", *SMALL, "--engine", "numpy", "--dtype", "all")
    assert outcome.exit_code == 0, outcome.stdout
    assert "Lookup(radius=1, levels=2)" in outcome.stdout
    assert "ok      numpy float16: grad_coords exact on integers, edges (with the" in outcome.stdout
    assert "ok      numpy float32: adjoint identity (with itself)" in outcome.stdout


def test_gradcheck_of_torch_differentiates_numerically():
    pytest.importorskip("torch")
    words = ["-b", "1", "-c", "1", "--height", "4", "-w", "5", "--radius", "0,1"]
    outcome = invoke("gradcheck", "cpu", *words, "--engine", "torch")
    assert outcome.exit_code == 0, outcome.stdout
    assert "ok      torch float64: torch.autograd.gradcheck " in outcome.stdout
    assert "ok      torch float64: torch.autograd.gradgradcheck " in outcome.stdout


@pytest.mark.parametrize("what", ["cost", "grad_fmap1", "grad_levels", "grad_coords"])
def test_gradcheck_fails_on_a_planted_error(monkeypatch, what):
    planted(monkeypatch, what)
    outcome = invoke("gradcheck", "cpu", *SMALL, "--engine", "numpy")
    assert outcome.exit_code == 1
    name = {"grad_levels": "grad_fmap2"}.get(what, what)
    assert f"FAILED  numpy float64: {name} exact on integers" in outcome.stdout
    assert re.fullmatch(r"\d+ passed, [1-9]\d* failed", outcome.stdout.splitlines()[-1])


# bench.


def test_bench_times_the_preparation_apart(tmp_path):
    out, document, problem = measured(tmp_path, "--scale", "ms")
    assert document["flow"] == "smooth"
    assert problem["lookup"] == {"radius": 1, "levels": 2}
    assert problem["multiply_adds"] == {"forward": 99 * 4 * 2 * 16, "backward": 2 * 99 * 4 * 2 * 16}
    assert problem["bytes"]["forward"] == 4 * (4 * 99 + 4 * (99 + 20) + 99 * 2 * 9)
    (one,) = problem["implementations"]
    assert one["prepare"]["output_bytes"] == 4 * 4 * (99 + 20)
    for step in ("prepare", "forward", "backward"):
        assert len(one[step]["seconds"]) == 1
        assert f"\n{step} " in out
    assert "cupycorr numpy  12 lookups with preparation: " in out
    assert "; prepared: 0.00190 MB" in out


@pytest.mark.parametrize(
    ("sweep", "lookups"),
    [
        ("radius=1,0x2", [Lookup(1), Lookup((0, 2))]),
        ("levels=1,2", [Lookup(1), Lookup(1, 2)]),
    ],
)
def test_a_sweep_varies_a_lookup(tmp_path, sweep, lookups):
    file = tmp_path / "bench.json"
    words = [*SMALL[:8], "--radius", "1", "-r", "1", "--engine", "numpy"]
    outcome = invoke("bench", "cpu", *words, "--sweep", sweep, "--json", file)
    assert outcome.exit_code == 0, outcome.output
    problems = json.loads(file.read_text())["problems"]
    assert [one["description"] for one in problems] == [repr(lookup) for lookup in lookups]


def test_an_order_is_swept_by_its_name(tmp_path):
    _, document, _ = measured(tmp_path, "--sweep", "order=yx,xy")
    assert [one["sweep"]["value"] for one in document["problems"]] == ["yx", "xy"]


def test_rough_flow_looks_elsewhere_than_smooth_flow():
    problem = PROBLEMS["square"]
    smooth, rough = (lookups.coordinates(problem, lookups.flow(problem, k)) for k in ("", "rough"))
    assert smooth.shape == rough.shape == (2, 2, 9, 10)
    jump = [
        np.abs(np.diff(one - np.indices((9, 10))[::-1], axis=3)).max() for one in (smooth, rough)
    ]
    assert jump[0] < 2 < jump[1]


def test_positions_of_stereo_stay_in_their_row():
    problem = PROBLEMS["stereo"]
    coords = lookups.coordinates(problem, lookups.flow(problem, "rough"))
    np.testing.assert_array_equal(coords[:, 1], np.indices((2, 5, 16))[1])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("other", lookups.PEERS)
def test_others_agree_with_ours_wherever_they_apply(other, name, dtype):
    peer, problem = lookups.PEERS[other], PROBLEMS[name]
    missing = peers.missing(peer, "product")
    obstacle = missing or peer.unable(problem.shape, problem.lookup, dtype, "cpu")
    if obstacle is not None:
        pytest.skip(obstacle)
    reference = lookups._reference(problem, dtype)
    for one in (lookups.ours("torch"), lookups.IMPLEMENTATIONS[other]):
        assert lookups._mistake(one, problem, dtype, lambda: reference) is None


def test_a_wrong_volume_is_reported_and_not_timed(tmp_path, monkeypatch):
    pytest.importorskip("torch")

    def doubled(*arguments):
        return 2 * lookups.sample(*arguments)

    wrong = lookups.IMPLEMENTATIONS["torch-volume"]._replace(look=doubled)
    monkeypatch.setitem(lookups.IMPLEMENTATIONS, "torch-volume", wrong)
    out, _, problem = measured(tmp_path, "--against", "torch-volume")
    assert re.search(r"^torch-volume: wrong: cost: \d+ of \d+ values differ", out, re.MULTILINE)
    assert problem["implementations"][1]["status"] == "wrong"


def test_what_has_no_gradients_is_timed_forward_alone(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    forward = lookups.IMPLEMENTATIONS["torch-volume"]._replace(has_gradients=False)
    monkeypatch.setitem(lookups.IMPLEMENTATIONS, "torch-volume", forward)
    out, _, problem = measured(tmp_path, "--against", "torch-volume")
    assert re.search(r"^torch-volume  12 lookups with preparation: [^,]*; ", out, re.MULTILINE)
    assert {*problem["implementations"][1]} == {"name", "status", "prepare", "forward"}


def test_a_wrong_gradient_of_ours_makes_bench_exit_1(monkeypatch):
    right = lookups.ours

    def ours(engine):
        def halved(*arguments):
            grad1, *grads = right(engine).vjp(*arguments)
            return grad1, *(grad / 2 for grad in grads)

        return right(engine)._replace(vjp=halved)

    monkeypatch.setattr(lookups, "ours", ours)
    outcome = invoke(*BENCH)
    assert outcome.exit_code == 1
    assert "cupycorr numpy: wrong: gradient of level 0: " in outcome.stdout


def test_all_measures_lookups_against_those_of_others(tmp_path):
    pytest.importorskip("torch")
    out, _, problem = measured(tmp_path, "--against", "all", "--flow", "rough")
    status = {one["name"]: one["status"] for one in problem["implementations"]}
    assert sorted(status) == sorted(["cupycorr numpy", *lookups.PEERS])
    assert status["torch-volume"] == "timed"
    volume = problem["implementations"][1]
    assert volume["prepare"]["output_bytes"] == 4 * 99 * (99 + 20)
    assert volume["prepare backward"]["min"] > 0
    assert ", with gradients " in out


def test_a_volume_that_is_looked_up_is_not_said_to_multiply(tmp_path):
    pytest.importorskip("torch")
    out, _, problem = measured(tmp_path, "--against", "torch-volume")
    shares = [line for line in out.splitlines() if re.match(r"(cupycorr numpy|torch).*%", line)]
    assert len(shares) == len(measure.PASSES)
    ours, volume = problem["implementations"]
    for step in measure.PASSES:
        assert min(ours[step]["shares"].values()) > 0
        assert volume[step]["shares"] == {"matmul": None, "copy": None}


def test_a_volume_that_would_divide_by_zero_is_skipped(tmp_path):
    pytest.importorskip("torch")
    out, _, _ = measured(tmp_path, "--levels", "4", "--against", "torch-volume")
    assert "torch-volume: skipped: divides by 0 on a level of one row or column" in out


def test_cost_volumes_and_lookups_are_measured_in_one_run(tmp_path):
    file = tmp_path / "bench.json"
    words = ["--preset", "raft-small", "--preset", "pwc-l6", "-c", "4", "-r", "1"]
    words += ["--height", "18", "-w", "20", "--engine", "numpy", "--json", file]
    assert invoke("bench", "cpu", *words).exit_code == 0
    lookup, volume = json.loads(file.read_text())["problems"]
    assert lookup["description"] == "Lookup(radius=3, levels=4, order='xy')"
    assert volume["description"] == "Geometry(patch_size=9)"


def test_images_are_looked_up_along_their_flow(tmp_path):
    image = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(0).integers(0, 255, (48, 72), np.uint8)
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, pixels in zip(files, (noise[:, 8:], noise[:, :-8]), strict=True):
        image.fromarray(pixels).save(file)
    _, document, problem = measured(tmp_path, "--images", *files, "--downscale", "4")
    assert document["flow"] == "matched"
    assert problem["shape"] == [1, 4, 12, 16]


@pytest.mark.parametrize("name", ["square", "stereo"])
def test_the_flow_between_images_is_in_positions_of_the_maps(name):
    noise = np.random.default_rng(0).integers(0, 255, (64, 104)).astype(np.float32)
    # The second image shows everything 8 pixels further left.
    pair = noise[:, :-8], noise[:, 8:]
    problem = PROBLEMS[name]._replace(shape=(1, 4, 16, 24))
    flow = lookups.image_flow(problem, pair, 4)
    assert flow.shape == (1, 2, 16, 24)
    assert np.median(flow[0, 0]) == pytest.approx(-2, abs=0.1)
    assert np.median(flow[0, 1]) == pytest.approx(0, abs=0.1)
    assert np.isfinite(flow).all()


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradcheck_passes_on_the_device(dtype):
    outcome = invoke("gradcheck", "cuda", *SMALL, "--dtype", dtype)
    assert outcome.exit_code == 0, outcome.output
    assert f"ok      cupy {dtype}: grad_coords exact on integers" in outcome.stdout
    assert f"ok      plain {dtype}: grad_fmap2 exact on integers, edges" in outcome.stdout


@pytest.mark.gpu
def test_bench_times_lookups_on_the_device(tmp_path):
    file = tmp_path / "bench.json"
    words = ["--engine", "cupy", "--engine", "plain", "-r", "2", "--json", file]
    outcome = invoke("bench", "cuda", *SMALL, *words)
    assert outcome.exit_code == 0, outcome.output
    for one in json.loads(file.read_text())["problems"][0]["implementations"]:
        assert one["status"] == "timed"
        for step in ("prepare", *measure.PASSES):
            assert one[step]["min"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [[], ["--channels-last"]])
def test_warmup_leaves_nothing_of_a_lookup_to_compile(monkeypatch, layout):
    cupy = pytest.importorskip("cupy")
    from cupycorr.cuda import engine as cuda_engine

    assert invoke("warmup", *SMALL, "-d", "half", *layout).exit_code == 0
    monkeypatch.setattr(cuda_engine, "_compile", lambda launch: pytest.fail(launch.kernel))
    fmap = cupy.ones((1, 4, 9, 11), cupy.float16)
    if layout:
        fmap = cupy.ascontiguousarray(fmap.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    coords = cupy.zeros((1, 2, 9, 11), cupy.float32)
    lookup = Lookup(1, 2)
    for maps in (fmap, sampling.pyramid(fmap, lookup)):
        cost = sampling.correlation_lookup(fmap, maps, coords, lookup)
        sampling.correlation_lookup_vjp(cost, fmap, maps, coords, lookup, needs=(True,) * 3)


@pytest.mark.gpu
def test_warmup_prints_the_kernels_of_a_lookup():
    problem = options.LookupProblem("", (1, 4, 9, 11), Lookup((1, 3), 2))
    kernels = cuda.kernels(problem, "float64")
    assert kernels
    assert all(one["registers"] > 0 for one in kernels)
