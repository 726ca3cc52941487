"""The kernels of the lookup's gradients compile for every GPU and keep values in registers."""

import re
from importlib import resources

import nvrtc
import pytest
from devices import DEVICES
from test_lookup_nvrtc import compiled, fields
from test_nvrtc import complaints, every_compiler

from cupycorr.cuda import lookup_grads_plan
from cupycorr.cuda import sources as cuda_sources
from cupycorr.cuda.lookup_plan import Problem
from cupycorr.lookup import Lookup

REASON = nvrtc.missing(*nvrtc.COMPILERS)
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

RAFT = Lookup(4, 4, order="xy")
MOST = 168  # registers of a thread, so that twelve warps fit a multiprocessor
REGISTERS = {
    "lookup_grad_fmap1": MOST,
    "lookup_grad_levels": MOST,
    "lookup_grad_coords": 112,
    "spread_windows": 48,
    "add_parts": 40,
    "list_readers": 40,
    "bound_tiles": 40,
    "plain_grad_fmap1": 96,
    "plain_grad_levels": 96,
    "plain_grad_coords": 152,  # of double
    "pool_adjoint": 64,
}


def launches(gpu, dtype, channels=256, *, plain=False):
    """Return the launches of all gradients, with indices, on maps of 1080p at an eighth."""
    size, device = (135, 240), DEVICES[gpu]
    cells = tuple(RAFT.level_sizes(*size))
    problem = Problem(2, (2, 2), channels, size, cells, (True,) * (1 + RAFT.levels))
    grads = lookup_grads_plan.plan_grads(
        lookup_grads_plan.RESULTS, problem, RAFT, dtype, device, indexed=(True, True), plain=plain
    )
    pyramid = lookup_grads_plan.plan_pyramid_grads(problem, RAFT, dtype, device)
    return [*grads.launches, *pyramid.launches]


def check(gpu, dtype, channels=256, *, compiler=None, plain=False):
    if DEVICES[gpu].capability not in nvrtc.capabilities(compiler):
        pytest.skip(f"NVRTC {nvrtc.version(compiler)} does not know {gpu}")
    # A multiprocessor of 7.5 holds 1024 threads: with fewer than 64 registers it holds no more.
    least = 64 if DEVICES[gpu].capability == 75 else 0
    for launch in dict.fromkeys(launches(gpu, dtype, channels, plain=plain)):
        most = max(least, REGISTERS[launch.kernel])
        assert not complaints(launch, compiled(launch, gpu, compiler), most)


@every_compiler
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("gpu", DEVICES)
def test_kernels_keep_to_their_registers(gpu, dtype, compiler):
    check(gpu, dtype, compiler=compiler)


@every_compiler
@pytest.mark.parametrize("gpu", ["A100", "H100"])
def test_kernels_of_bfloat16_keep_to_their_registers(gpu, compiler):
    check(gpu, "bfloat16", compiler=compiler)


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [("float32", 128), ("float32", 67), ("bfloat16", 256), ("bfloat16", 100), ("float16", 9)],
)
def test_kernels_of_other_channels_keep_to_their_registers(dtype, channels):
    check("A100", dtype, channels)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("gpu", ["V100", "A100", "5090"])
def test_plain_kernels_keep_to_their_registers(gpu, dtype):
    check(gpu, dtype, plain=True)


@pytest.mark.parametrize("kernel", ["lookup_grad_fmap1", "lookup_grad_levels"])
def test_four_of_five_instructions_of_the_inner_loops_are_multiply_adds(kernel):
    launch = next(one for one in launches("A100", "float32") if one.kernel == kernel)
    # Loops around the inner one divide, too, by more multiply-adds.
    inner, _ = nvrtc.loops(compiled(launch, "A100"), lambda loop: not loop["I2F"] and loop["FFMA"])
    assert nvrtc.multiply_adds(inner) == 2 * 8 * 8  # items, targets, channels of a lane
    assert inner.total() <= 1.25 * nvrtc.multiply_adds(inner)


STRUCTS = {
    "lookup_grad_levels": ("lookup_grad.cu", "GradSizes : Sizes"),
    "plain_grad_levels": ("lookup_grad_plain.cu", ""),
    "bound_tiles": ("lookup_grad_lists.cu", ""),
    "pool_adjoint": ("lookup_grad_pool.cu", ""),
}


@pytest.mark.parametrize("kernel", STRUCTS)
def test_sizes_are_named_as_the_struct_names_them(kernel):
    found = {
        launch.kernel: launch
        for plain in (False, True)
        for launch in launches("A100", "float32", plain=plain)
    }
    file, struct = STRUCTS[kernel]
    names = dict.fromkeys(re.sub(r"\[\d+\]", "[levels]", name) for name, _ in found[kernel].sizes)
    wanted = fields(cuda_sources._read("lookup.cuh"), "Sizes")
    if struct:
        wanted += fields(cuda_sources._read(file), struct)
    assert list(names) == wanted


def test_the_chosen_problems_reach_every_kernel():
    planned = {
        launch.kernel
        for plain in (False, True)
        for launch in launches("A100", "float32", plain=plain)
    }
    folder = resources.files("cupycorr.kernels")
    text = "".join(
        file.read_text() for file in folder.iterdir() if file.name.startswith("lookup_grad")
    )
    assert planned == set(re.findall(r"__launch_bounds__\([^)]*\)\s+(\w+)\(", text))
    assert planned == REGISTERS.keys()
