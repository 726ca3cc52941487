"""The texts of the kernels: sizes that launches pass are fields of a struct; lines are short."""

import re
from pathlib import Path

import host
import pytest
from cases import CASES
from host import DEVICES

from cupycorr.cuda.sources import _read

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*(ROOT / "kernels").glob("*.cu*"), *(ROOT / "tests" / "support").glob("hostcuda.*")]
KERNELS = (
    "plain.cu", "product.cu", "product_adjoint.cu", "taps.cu", "tensor.cu", "tensor_adjoint.cu",
    "transpose.cu",
)  # fmt: skip


def fields(text):
    """Return the names of the ints that `struct Sizes` of a source declares."""
    body = re.search(r"struct Sizes \{(.*?)\};", text, re.DOTALL)[1]
    body = re.sub(r"//.*", "", body)
    return [name for declared in re.findall(r"int ([^;]+);", body)
            for name in re.split(r",\s*", declared.strip())]  # fmt: skip


def launches():
    """Return a launch of each source."""
    found = {}
    for shape, layer in CASES.values():
        for plain in (False, True):
            for launch in host.launches(shape, layer, "float32", DEVICES["sm_80"], plain=plain):
                found.setdefault(launch.source, launch)
    for dtype in ("float16", "float32"):
        options = {"channels_last": True}
        for launch in host.launches(*CASES["FlowNetC"], dtype, DEVICES["sm_80"], **options):
            found.setdefault(launch.source, launch)
    return found


@pytest.mark.parametrize("source", KERNELS)
def test_sizes_are_named_as_the_struct_names_them(source):
    assert [name for name, _ in launches()[source].sizes] == fields(_read(source))


def test_a_field_that_moved_is_caught():
    text = _read("product.cu").replace(
        "int channels, height, width;", "int height, channels, width;"
    )
    assert [name for name, _ in launches()["product.cu"].sizes] != fields(text)


def too_long(text):
    return [line for line in text.splitlines() if len(line) > 100]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_lines_have_at_most_100_columns(path):
    assert too_long(path.read_text()) == []


def test_a_long_line_is_caught():
    assert too_long("a" * 100 + "\n" + "b" * 101) == ["b" * 101]
