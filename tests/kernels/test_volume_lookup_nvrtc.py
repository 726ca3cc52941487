"""The kernels of the volume lookup compile for every GPU and keep values in registers."""

import re

import nvrtc
import pytest
from devices import DEVICES
from test_lookup_nvrtc import fields
from test_nvrtc import complaints

from cupycorr.cuda import sources as cuda_sources
from cupycorr.cuda import volume_lookup_plan
from cupycorr.lookup import Lookup

REASON = nvrtc.missing(*nvrtc.COMPILERS)
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

REGISTERS = {"volume_cost": 64, "volume_gradients": 144}  # at most, of a thread
DTYPES = ("float32", "float16", "bfloat16", "float64")
#           name: (lookup, positions, size of level 0)
VOLUMES = {
    "RAFT": (Lookup(4, 4, order="xy"), (55, 128), (55, 128)),
    "stereo": (Lookup((0, 4), 2, pool=(1, 2)), (96, 160), (1, 160)),
    "large": (Lookup(30, 2, dilation_patch=2), (55, 128), (55, 128)),
}


def launches(dtype, name):
    """Return the launches of a volume lookup's cost and gradients."""
    lookup, positions, size = VOLUMES[name]
    problem = volume_lookup_plan.problem_of((1, 2, *positions), tuple(lookup.level_sizes(*size)))
    both = volume_lookup_plan.GRADIENTS
    return [
        volume_lookup_plan.plan_cost(problem, lookup, dtype),
        *(
            volume_lookup_plan.plan_grads(results, problem, lookup, dtype)
            for results in (both[:1], both[1:], both)
        ),
    ]


def wrong(gpu, dtype, name):
    """Return what is wrong with a volume lookup's kernels, compiled for a GPU."""
    capability, found = DEVICES[gpu].capability, []
    for launch in launches(dtype, name):
        kernel = nvrtc.compile_kernel(cuda_sources.source(launch), launch.kernel, capability)
        found += complaints(launch, kernel, REGISTERS[launch.kernel])
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", DEVICES)
def test_kernels_keep_to_their_registers(gpu, dtype):
    if DEVICES[gpu].capability not in nvrtc.capabilities():
        pytest.skip(f"NVRTC {nvrtc.version()} does not know {gpu}")
    assert not wrong(gpu, dtype, "RAFT")


@pytest.mark.parametrize("name", ["stereo", "large"])
def test_kernels_of_other_lookups_keep_to_their_registers(name):
    assert not wrong("A100", "float32", name)


def test_units_of_16_bytes_are_written_at_once():
    for dtype in DTYPES:
        launch = launches(dtype, "RAFT")[1]
        kernel = nvrtc.compile_kernel(cuda_sources.source(launch), launch.kernel, 80)
        assert 16 in nvrtc.widths(kernel, "STG")


def test_sizes_are_named_as_the_struct_names_them():
    names = fields(cuda_sources._read("lookup.cuh"), "Sizes")
    for launch in launches("float32", "RAFT"):
        found = (re.sub(r"\[\d+\]", "[levels]", name) for name, _ in launch.sizes)
        assert list(dict.fromkeys(found)) == names
