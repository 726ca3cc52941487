"""The kernels of the flow-guided lookup compile for every GPU and keep values in registers."""

import re
from importlib import resources

import nvrtc
import pytest
from devices import DEVICES
from test_nvrtc import complaints

from cupycorr.cuda import lookup_plan
from cupycorr.cuda import sources as cuda_sources
from cupycorr.lookup import Lookup

REASON = nvrtc.missing(*nvrtc.COMPILERS)
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

REGISTERS = {"lookup_pack": 40, "lookup_pool": 40, "lookup_plain": 128}  # at most, of a thread
DTYPES = ("float32", "float16", "bfloat16", "float64")
LOOKUPS = {"RAFT": Lookup(4, 4, order="xy"), "small": Lookup(3, 4)}


def launches(gpu, dtype, name, **options):
    """Return the launches of a lookup on maps of 1080p at an eighth, and of its levels."""
    lookup, size = LOOKUPS[name], (135, 240)
    cells = tuple(lookup.level_sizes(*size))
    last = (False,) + (True,) * lookup.levels
    problem = lookup_plan.Problem(1, (1, 1), 256, size, cells, last)
    options = {"plain": False} | options
    return [
        *lookup_plan.plan_pyramid(problem, lookup, dtype, copied=True).launches,
        *lookup_plan.plan_cost(problem, lookup, dtype, DEVICES[gpu], **options).launches,
    ]


def compiled(launch, gpu):
    source = cuda_sources.source(launch)
    return nvrtc.compile_kernel(source, launch.kernel, DEVICES[gpu].capability)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", ["V100", "A100", "5090"])
def test_plain_kernels_keep_to_their_registers(gpu, dtype):
    if DEVICES[gpu].capability not in nvrtc.capabilities():
        pytest.skip(f"NVRTC {nvrtc.version()} does not know {gpu}")
    for launch in dict.fromkeys(launches(gpu, dtype, "RAFT", plain=True)):
        assert not complaints(launch, compiled(launch, gpu), REGISTERS[launch.kernel])


def fields(text, struct):
    """Return the names of the ints of a struct, with numbers for elements of arrays."""
    body = re.search(rf"struct {struct} \{{(.*?)\}};", text, re.DOTALL)[1]
    body = re.sub(r"//.*", "", body)
    return [name for declared in re.findall(r"int ([^;]+);", body)
            for name in re.split(r",\s*", declared.strip())]  # fmt: skip


STRUCTS = {
    "lookup_pack": ("lookup_pack.cu", "Sizes"),
    "lookup_pool": ("lookup_pack.cu", "Pooled"),
    "lookup_plain": ("lookup.cuh", "Sizes"),
}


@pytest.mark.parametrize("kernel", STRUCTS)
def test_sizes_are_named_as_the_struct_names_them(kernel):
    found = {launch.kernel: launch for launch in launches("A100", "float32", "RAFT", plain=True)}
    file, struct = STRUCTS[kernel]
    numbered = re.compile(r"\[\d+\]")
    names = dict.fromkeys(numbered.sub("[levels]", name) for name, _ in found[kernel].sizes)
    assert list(names) == fields(cuda_sources._read(file), struct)


def test_the_chosen_lookups_reach_every_kernel():
    planned = {
        launch.kernel
        for plain in (False, True)
        for launch in launches("A100", "float32", "RAFT", plain=plain)
    }
    folder = resources.files("cupycorr.kernels")
    text = "".join(folder.joinpath(f"{file}.cu").read_text()
                   for file in ("lookup_pack", "lookup_plain"))  # fmt: skip
    assert planned == set(re.findall(r"__launch_bounds__\([^)]*\)\s+(\w+)\(", text))
