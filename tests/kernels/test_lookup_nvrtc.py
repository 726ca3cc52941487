"""The kernels of the flow-guided lookup compile for every GPU and keep values in registers."""

import re
from importlib import resources

import nvrtc
import pytest
from devices import DEVICES
from test_nvrtc import complaints, disassembles, every_compiler

from cupycorr.cuda import lookup_plan
from cupycorr.cuda import sources as cuda_sources
from cupycorr.lookup import Lookup

REASON = nvrtc.missing(*nvrtc.COMPILERS)
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

REGISTERS = {"lookup_pack": 40, "lookup_pool": 40, "lookup_plain": 128}  # at most, of a thread
DTYPES = ("float32", "float16", "bfloat16", "float64")
LOOKUPS = {
    "RAFT": Lookup(4, 4, order="xy"),
    "small": Lookup(3, 4),
    "stereo": Lookup((0, 4), 4, pool=(1, 2)),
    "wide": Lookup(7),
    "dilated": Lookup(3, 2, dilation_patch=(1, 2)),
    "wide stereo": Lookup((0, 16), 2, pool=(1, 2)),
}
TILED = [
    *(("RAFT", gpu, dtype) for gpu in DEVICES for dtype in ("float32", "float16")),
    ("RAFT", "A100", "bfloat16"),
    *((name, "A100", dtype) for name in ("small", "stereo", "wide", "dilated", "wide stereo")
      for dtype in ("float32", "float16")),
]  # fmt: skip
FINE = (12, 11, 10, 9, 8, 7, 6, 4, 2)  # steps that have a loop of their own


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


def compiled(launch, gpu, compiler=None):
    source = cuda_sources.source(launch)
    return nvrtc.compile_kernel(source, launch.kernel, DEVICES[gpu].capability, compiler)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", ["V100", "A100", "5090"])
def test_plain_kernels_keep_to_their_registers(gpu, dtype):
    if DEVICES[gpu].capability not in nvrtc.capabilities():
        pytest.skip(f"NVRTC {nvrtc.version()} does not know {gpu}")
    for launch in dict.fromkeys(launches(gpu, dtype, "RAFT", plain=True)):
        assert not complaints(launch, compiled(launch, gpu), REGISTERS[launch.kernel])


def tiled(name, gpu, dtype, compiler=None):
    """Return the launch of a tiled lookup and its kernel."""
    if DEVICES[gpu].capability not in nvrtc.capabilities(compiler):
        pytest.skip(f"NVRTC {nvrtc.version(compiler)} does not know {gpu}")
    *_, launch = launches(gpu, dtype, name)
    assert launch.kernel == "lookup_tiled"
    return launch, compiled(launch, gpu, compiler)


@every_compiler
@pytest.mark.parametrize("case", TILED, ids=" ".join)
def test_tiles_keep_to_their_registers(case, compiler):
    launch, kernel = tiled(*case, compiler)
    resident = dict(launch.constants)["resident"]
    most = 65536 // (resident * launch.threads) // 8 * 8
    assert not complaints(launch, kernel, min(255, most))
    assert resident >= 2


@disassembles
@pytest.mark.parametrize("gpu", ["A100", "H100", "4090"])
def test_tensor_cores_multiply_halves_and_nothing_else(gpu):
    launch, kernel = tiled("RAFT", gpu, "float16")
    tile, found = dict(launch.constants), nvrtc.instructions(kernel)
    assert found["HMMA"] == tile["units"] * sum(steps for steps in FINE if steps <= tile["steps"])
    assert not nvrtc.instructions(tiled("RAFT", gpu, "float32")[1])["HMMA"]


@disassembles
@pytest.mark.parametrize("gpu", ["2070S", "A100", "H100"])
def test_most_instructions_of_the_inner_loop_multiply(gpu):
    launch, kernel = tiled("RAFT", gpu, "float32")
    inner, _ = nvrtc.loops(kernel, lambda loop: loop["FFMA"] if loop["BAR"] == 0 else 0)
    steps = dict(launch.constants)["steps"]
    assert inner["LDS.128"] >= 8 + steps
    assert inner["FFMA"] >= 0.85 * inner.total()


@disassembles
@pytest.mark.parametrize("gpu", ["2070S", "A100"])
def test_one_instruction_copies_sixteen_bytes(gpu):
    _, kernel = tiled("RAFT", gpu, "float32")
    assert nvrtc.widths(kernel, "LDGSTS") == ({16} if gpu == "A100" else set())
    assert 16 in nvrtc.widths(kernel, "LDG") or gpu == "A100"


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
    "lookup_tiled": ("lookup.cuh", "Sizes"),
}


@pytest.mark.parametrize("kernel", STRUCTS)
def test_sizes_are_named_as_the_struct_names_them(kernel):
    found = {
        launch.kernel: launch
        for plain in (False, True)
        for launch in launches("A100", "float32", "RAFT", plain=plain)
    }
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
                   for file in ("lookup_pack", "lookup_plain", "lookup_tiled"))  # fmt: skip
    assert planned == set(re.findall(r"__launch_bounds__\([^)]*\)\s+(\w+)\(", text))
