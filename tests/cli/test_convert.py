"""``cupycorr convert``: whose words it takes options for, and that what it prints runs."""

import shlex

import numpy as np
import pytest
from command import installed, invoke

from cupycorr import verify
from cupycorr.compat.vocabularies import VOCABULARIES

TERMS = 36  # of a window at most: 9 taps and 4 channels
# Options, whose words they are, and the layer as users of that system write it.
LAYERS = {
    "--pad-size 8 --max-displacement 8 --stride2 2": (
        "nvidia",
        "nvidia.Correlation(pad_size=8, kernel_size=1, max_displacement=8)(x1, x2)",
    ),
    "--pad-size 4 --kernel-size 3 --max-displacement 2 --stride1 2 --stride2 1": (
        "nvidia",
        "nvidia.Correlation(4, 3, 2, 2, 1)(x1, x2)",
    ),
    "--patch-size 9 --dilation-patch 2": (
        "cupycorr",
        "spatial_correlation_sample(x1, x2, patch_size=9, dilation_patch=2)",
    ),
    "--kernel-size 3,2 --patch-size 3 --stride 2 --padding 1 --dilation 1,2": (
        "cupycorr",
        "spatial_correlation_sample(x1, x2, (3, 2), 3, 2, 1, (1, 2))",
    ),
    "--patch-size 1,6 --first-displacement=0,-5 --normalize": (
        "cupycorr",
        "correlation(x1, x2, Geometry(patch_size=(1, 6), first_displacement=(0, -5)), "
        "normalize=True)",
    ),
    "--max-disp 8 --dila-patch 2": ("taichi", "taichi.CorrTaichi(8, 2)(x1, x2)"),
    "--max-disp 3 --dila-patch 2": ("taichi", "taichi.CorrTaichi(3, 2)(x1, x2)"),
    "--pad 4 --kernel-size 1 --max-displacement 4": (
        "caffe",
        "caffe.Correlation(kernel_size=1, max_displacement=4, pad=4)(x1, x2)",
    ),
    "--pad 5 --kernel-size 1 --max-displacement 5 --stride-2 2 --single-direction -1": (
        "caffe-1d",
        "caffe.Correlation1D(1, 5, pad=5, stride_2=2, single_direction=-1)(x1, x2)",
    ),
    "--pad 4 --kernel-size 3 --max-displacement 4 --correlation-type subtract": (
        "caffe",
        "caffe.Correlation(3, 4, pad=4, correlation_type='subtract')(x1, x2)",
    ),
    "--from mmcv --kernel-size 3 --max-displacement 4 --padding 1": (
        "mmcv",
        "mmcv.Correlation(kernel_size=3, max_displacement=4, padding=1)(x1, x2)",
    ),
    "--max-displacement 2 --dilation-patch 2": (
        "mmcv",
        "mmcv.Correlation(max_displacement=2, dilation_patch=2)(x1, x2)",
    ),
    "--from pytorch-pwc": ("pytorch-pwc", "sniklaus.FunctionCorrelation(x1, x2)"),
    "--int-stride 2": (
        "pytorch-liteflownet",
        "sniklaus.FunctionCorrelation(tenFirst=x1, tenSecond=x2, intStride=2)",
    ),
}


def converted(words):
    """Return the first line, the imports, and what stands beside each system."""
    outcome = invoke("convert", *shlex.split(words))
    assert outcome.exit_code == 0, outcome.output
    heading, imports, table = outcome.stdout.split("\n\n")
    rows = (line.split(maxsplit=1) for line in table.splitlines())
    return heading.splitlines(), imports, dict(rows)


@pytest.fixture
def maps():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.standard_normal((2, 4, 21, 23))) for _ in range(2)]


def results(words, maps, line, sampler=None):
    """Return what the original layer and a line compute, and the size of the former's terms."""
    _, original = LAYERS[words]
    namespace = dict(zip(("x1", "x2"), maps, strict=True))
    exec(converted(words)[1], namespace)
    want = eval(original, namespace)
    absolute = {name: namespace[name].abs() for name in ("x1", "x2")}
    size = want if "subtract" in original else eval(original, namespace | absolute)
    own = {} if sampler is None else {"spatial_correlation_sample": sampler}
    got = eval(line, namespace | own)
    return want.numpy(), size.numpy(), got.numpy()


def mistakes(words, maps):
    """Return the lines whose results are not those of the original layer."""
    heading, _, lines = converted(words)
    system = LAYERS[words][0]
    assert heading[0].partition(":")[0] == system
    assert list(lines) == list(VOCABULARIES)
    possible = [line for line in lines.values() if not line.startswith("cannot: ")]
    assert {lines[system], lines["cupycorr"]} <= set(possible)
    wrong = []
    for line in possible:
        want, size, got = results(words, maps, line)
        if verify.excess(got, want, size, TERMS, "float64"):
            wrong.append(line)
    return wrong


@pytest.mark.parametrize("words", LAYERS)
def test_every_line_computes_what_the_layer_computes(words, maps):
    assert mistakes(words, maps) == []


@pytest.mark.parametrize("words", LAYERS)
def test_the_samplers_line_is_right_for_the_original_too(words, maps):
    sampler = pytest.importorskip("spatial_correlation_sampler")
    line = converted(words)[2]["spatial-correlation-sampler"]
    if not line.startswith("cannot: "):
        want, size, got = results(words, maps, line, sampler.spatial_correlation_sample)
        assert verify.excess(got, want, size, TERMS, "float64") is None


@pytest.mark.parametrize(
    ("system", "error"),
    [
        ("taichi", {"normalize": True}),
        ("spatial-correlation-sampler", {"flat": True}),
        ("nvidia", {"write": lambda setting: {"max_displacement": 8, "kernel_size": 1}}),
    ],
)
def test_a_planted_error_is_caught(monkeypatch, maps, system, error):
    monkeypatch.setitem(VOCABULARIES, system, VOCABULARIES[system]._replace(**error))
    (line,) = mistakes("--pad-size 8 --max-displacement 8 --stride2 2", maps)
    assert line == converted("--pad-size 8 --max-displacement 8 --stride2 2")[2][system]


@pytest.mark.parametrize("words", LAYERS)
def test_sizes_are_those_of_each_systems_result(words, maps):
    _, imports, lines = converted(f"{words} --size 21 23")
    namespace = dict(zip(("x1", "x2"), maps, strict=True))
    exec(imports, namespace)
    for line in lines.values():
        call, _, size = line.partition("  # ")
        # What follows the layer makes up for its layout.
        layer = call.partition(".flatten(")[0].partition(".unflatten(")[0].split(" / ")[0]
        if not line.startswith("cannot"):
            shape = tuple(eval(layer, namespace).shape)
            assert eval(size, {"N": 2}) == shape


@pytest.mark.parametrize(
    ("words", "system", "line"),
    [
        ("--pad-size 20 --max-displacement 20 --stride2 2", "spatial-correlation-sampler",
         "spatial_correlation_sample(x1, x2, patch_size=21, dilation_patch=2).flatten(1, 2)"
         " / x1.shape[1]"),
        ("--patch-size 21 --dilation-patch 2", "taichi",
         "taichi.CorrTaichi(max_disp=20, dila_patch=2)(x1, x2).unflatten(1, (21, 21))"),
        ("--max-disp 20 --dila-patch 2", "mmcv",
         "mmcv.Correlation(max_displacement=10, dilation_patch=2)(x1, x2).flatten(1, 2)"),
        ("--patch-size 3 --kernel-size 3", "nvidia",
         "nvidia.Correlation(pad_size=1, kernel_size=3, max_displacement=1, stride1=1, stride2=1)"
         "(x1, x2).unflatten(1, (3, 3)) * (9 * x1.shape[1])"),
        ("--max-disp 3 --dila-patch 2", "spatial-correlation-sampler",
         "cannot: it has centred patches only"),
        ("--max-disp 4", "caffe-1d", "cannot: it displaces horizontally only"),
    ],
)  # fmt: skip
def test_known_layers_are_translated_as_by_hand(words, system, line):
    assert converted(words)[2][system] == line


def test_the_heading_says_what_was_understood():
    heading, _, _ = converted("--max-displacement 4 --pad 4 --kernel-size 1 --stride-2 2")
    assert heading == [
        "caffe: kernel_size=1, max_displacement=4, pad=4, stride_2=2",
        "Geometry(patch_size=5, dilation_patch=2), mean of products",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give a layer's parameters, or --from"),
        ("--stride 2 --stride2 2", "no system has --stride and --stride2 together"),
        ("--pad 4 --stride-1 2", "caffe needs --kernel-size and --max-displacement"),
        ("--kernel-size 1 --max-displacement 4",
         "nvidia and caffe and mmcv mean different things"),
        ("--from nvidia --kernel-size 2 --max-displacement 4", "kernel_size must be odd"),
        ("--from nvidia --max-disp 4", "no system has --max-disp"),
        ("--from caffe-1d --kernel-size 1 --max-displacement 4",
         "caffe-1d needs --single-direction"),
        ("--patch-size 0", "patch_size must be at least 1, got 0"),
        ("--max-disp -4", "max_disp must be at least 0, got -4"),
        ("--patch-size 3,x", "neither an int nor two ints"),
        ("--patch-size 3 --kernel-size 9 --size 4 5", "the taps must fit"),
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_a_usage_error(words, message):
    outcome = invoke("convert", *shlex.split(words))
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.stderr.split())


def test_an_option_says_whose_word_it_is():
    text = " ".join(invoke("convert", "--help").stdout.split())
    assert "--dila-patch INT Of taichi." in text
    assert "--max-displacement INT Of nvidia, caffe, caffe-1d, mmcv." in text


def test_a_terminal_gets_a_table(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    out = invoke("convert", "--max-disp", "4", "--size", "8", "9").stdout
    assert "│" in out
    assert "taichi.CorrTaichi(max_disp=4)(x1, x2)" in out
    assert "(N, 81, 8, 9)" in out


def test_piped_output_is_plain():
    outcome = installed("convert", "--max-disp", "4")
    assert outcome.returncode == 0
    assert outcome.stderr == ""
    assert outcome.stdout.isascii()
    assert "\x1b" not in outcome.stdout
