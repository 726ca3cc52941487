"""``cupycorr convert``: whose words it takes options for, and that what it prints runs."""

import shlex

import numpy as np
import pytest
from command import installed, invoke

from cupycorr import Geometry, verify
from cupycorr.compat.systems import SYSTEMS
from cupycorr.layer import Layer

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
    """Return the paragraphs that are printed: the heading, the call, and the drop-in if any."""
    outcome = invoke("convert", *shlex.split(words))
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout.rstrip().split("\n\n")


@pytest.fixture
def maps():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.standard_normal((2, 4, 21, 23))) for _ in range(2)]


def computed(paragraph, maps):
    """Run an import and a call that were printed."""
    namespace = dict(zip(("x1", "x2"), maps, strict=True))
    imports, call = paragraph.splitlines()
    exec(imports, namespace)
    return eval(call, namespace)


def mistakes(words, maps):
    """Return the printed calls whose results are not those of the layer as its users write it."""
    system, original = LAYERS[words]
    heading, *calls = converted(words)
    assert heading.splitlines()[0].partition(":")[0] == system
    namespace = dict(zip(("x1", "x2"), maps, strict=True))
    exec("from cupycorr import *\nfrom cupycorr.compat import *", namespace)
    want = eval(original, namespace)
    absolute = {name: namespace[name].abs() for name in ("x1", "x2")}
    size = want if "subtract" in original else eval(original, namespace | absolute)
    assert len(calls) == 1 + (SYSTEMS[system].call is not None)
    results = [computed(call, maps).numpy() for call in calls]
    return [
        call
        for call, got in zip(calls, results, strict=True)
        if verify.excess(got, want.numpy(), size.numpy(), TERMS, "float64")
    ]


@pytest.mark.parametrize("words", LAYERS)
def test_every_call_computes_what_the_layer_computes(words, maps):
    assert mistakes(words, maps) == []


@pytest.mark.parametrize(
    "error",
    [
        {"flat": False},
        {"layer": lambda **words: Layer(Geometry.from_flownet(**words))},
        {"layer": lambda **words: Layer(Geometry(patch_size=9, dilation_patch=2), "product", True)},
    ],
    ids=["layout", "division", "geometry"],
)
def test_a_planted_error_is_caught(monkeypatch, maps, error):
    monkeypatch.setitem(SYSTEMS, "nvidia", SYSTEMS["nvidia"]._replace(**error))
    words = "--pad-size 8 --max-displacement 8 --stride2 1"
    monkeypatch.setitem(LAYERS, words, ("nvidia", "nvidia.Correlation(8, 1, 8, 1, 1)(x1, x2)"))
    wrong = mistakes(words, maps)
    assert len(wrong) == 1
    assert "correlation(x1, x2, Geometry" in wrong[0]


@pytest.mark.parametrize("words", LAYERS)
def test_the_size_is_that_of_the_result(words, maps):
    _, call, *_, size = converted(f"{words} --size 21 23")
    assert eval(size.removeprefix("shape: "), {"N": 2}) == tuple(computed(call, maps).shape)


def test_known_layers_are_translated_as_by_hand():
    assert converted("--pad-size 20 --max-displacement 20 --stride2 2")[1:] == [
        "from cupycorr import Geometry, correlation\n"
        "correlation(x1, x2, Geometry(patch_size=21, dilation_patch=2), normalize=True)"
        ".flatten(1, 2)",
        "from cupycorr.compat import nvidia\n"
        "nvidia.Correlation(pad_size=20, kernel_size=1, max_displacement=20, stride1=1, stride2=2)"
        "(x1, x2)",
    ]
    assert converted("--max-disp 3 --dila-patch 2")[1].splitlines()[1] == (
        "correlation(x1, x2, Geometry(patch_size=4, dilation_patch=2, first_displacement=-3))"
        ".flatten(1, 2)"
    )


def test_the_heading_says_what_was_understood():
    heading, *_ = converted("--max-displacement 4 --pad 4 --kernel-size 1 --stride-2 2")
    assert heading.splitlines() == [
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
    assert "--dila-patch INT A parameter of taichi." in text
    assert "--max-displacement INT A parameter of nvidia, caffe, caffe-1d, mmcv." in text


def test_piped_output_is_plain():
    outcome = installed("convert", "--max-disp", "4")
    assert outcome.returncode == 0
    assert outcome.stderr == ""
    assert outcome.stdout.isascii()
    assert "\x1b" not in outcome.stdout
