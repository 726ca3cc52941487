"""What the lookup's gradients do: counted as they run, and as kernels/README.md says."""

import ctypes

import host
import lookup_grads_host
import numpy as np
import nvrtc
import pytest
from devices import DEVICES
from host import SM_80
from lookup_grads_costs import (
    AT_ONCE,
    ITEM,
    count_fmap1,
    count_levels,
    microseconds,
    segments_of,
)
from test_lookup_gradients_nvrtc import launches
from test_lookup_model import RAFT, SHOWN, SIZES, rows
from test_lookup_nvrtc import compiled

from cupycorr.cuda import lookup_grads_plan
from cupycorr.cuda import sources as cuda_sources
from cupycorr.cuda.cost import ISSUE, matrix_rate
from cupycorr.cuda.lookup_grads_plan import (
    INTEGER_RATE,
    INTEGERS,
    LANES,
    MATRICES,
    PARTS,
    STEP,
    STEP_CHANNELS,
    STEP_ITEMS,
    TARGETS,
)
from cupycorr.lookup import Lookup

# Counters in the kernels: items that a warp adds, and products of fragments.
COUNTED = (
    "using Sums = float",
    'extern "C" __attribute__((visibility("default"))) long counted, products;\n'
    "long counted, products;\nusing Sums = float",
    "    const auto numbers = *reinterpret_cast<const Pack<int, at_once>*>",
    "    counted += threadIdx.x % 32 == 0 ? at_once : 0;\n"
    "    const auto numbers = *reinterpret_cast<const Pack<int, at_once>*>",
    "    Address from[4];\n",
    "    Address from[4];\n    counted += threadIdx.x % 32 == 0 ? 16 : 0;\n",
    "            multiply_matrices<element>(\n",
    "            products += threadIdx.x % 32 == 0;\n            multiply_matrices<element>(\n",
)


def flowing(size, kind):
    """Return coords (2, H, W): constant flow, or one that differs from position to position."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.0
    coords = np.stack([x + 2.375, y - 1.625])
    if kind == "rough":
        coords += np.random.default_rng(0).integers(-20, 21, coords.shape)
    return coords


@pytest.mark.skipif(host.unavailable() is not None, reason=str(host.unavailable()))
@pytest.mark.parametrize("kind", ["constant", "rough"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("result", ["grad_fmap1", "grad_levels"])
def test_kernels_add_as_many_items_as_the_model_says(result, dtype, kind):
    lookup, size, channels, counters, segments = Lookup(4, 3), (11, 21), 256, [], []
    coords = flowing(size, kind)
    cells = lookup.level_sizes(*size)
    maps = np.ones((1, channels, *size)), [np.ones((1, channels, *one)) for one in cells]
    grad = np.ones(lookup.cost_shape(maps[0].shape, (1, 2, *size)))

    def planned(plan):
        launch = next(one for one in plan.launches if one.kernel == f"lookup_{result}")
        library = host.build(launch, "run", COUNTED)
        counters.extend(ctypes.c_long.in_dll(library, name) for name in ("counted", "products"))
        for counter in counters:
            counter.value = 0
        segments.append(segments_of(plan) if result == "grad_levels" else None)
        return plan

    lookup_grads_host.grads(
        SM_80, grad, *maps, coords[None], lookup, dtype=dtype, results=(result,), patch=COUNTED,
        planned=planned,
    )  # fmt: skip
    at_once = STEP_ITEMS if dtype in PARTS else AT_ONCE[4]
    if result == "grad_fmap1":
        counts = count_fmap1(lookup, coords, cells, at_once)
    else:
        counts = count_levels(lookup, coords, cells, at_once, *segments)
    items, products = (counter.value for counter in counters)
    assert items == counts.items
    # A product has 16 channels, 8 targets and 16 items.
    assert products == items // STEP_ITEMS * (channels // 16) * PARTS.get(dtype, 0)


@pytest.mark.skipif(nvrtc.missing(*nvrtc.COMPILERS) is not None, reason="needs NVRTC")
def test_an_item_takes_the_instructions_of_the_model():
    launch = next(one for one in launches("A100", "float32") if one.kernel == "lookup_grad_fmap1")
    inner, _ = nvrtc.loops(compiled(launch, "A100"), lambda loop: not loop["I2F"] and loop["FFMA"])
    assert inner.total() - nvrtc.multiply_adds(inner) == AT_ONCE[4] * ITEM


RARE = 0  # the number of a mark: where a factor becomes smaller
# Instructions that the integer unit takes, or either of two units.
INTEGER = {"SEL", "PRMT", "LOP3", "ISETP", "SHF", "LEA", "IMNMX", "FSETP", "FSEL", "FMNMX", "IADD3"}


@pytest.mark.skipif(nvrtc.missing(*nvrtc.COMPILERS) is not None, reason="needs NVRTC")
@pytest.mark.parametrize("dtype", PARTS)
@pytest.mark.parametrize("kernel", MATRICES)
@pytest.mark.parametrize("gpu", ["A100", "H100"])
def test_a_step_on_tensor_cores_takes_the_instructions_of_the_model(gpu, kernel, dtype):
    launch = next(one for one in launches(gpu, dtype) if one.kernel == kernel)
    source = cuda_sources.source(launch).replace(
        "== 0) return;\n", f"== 0) return;\n{nvrtc.mark(RARE)}\n"
    )
    compiled = nvrtc.compile_kernel(source, kernel, DEVICES[gpu].capability)
    inner, _ = nvrtc.loops(compiled, lambda loop: loop["HMMA"], (RARE,))
    assert inner["HMMA"] == PARTS[dtype] * STEP_CHANNELS // 16
    assert 0.9 * STEP < inner.total() <= STEP
    assert 0.9 * INTEGERS < sum(inner[name] for name in INTEGER) <= 1.05 * INTEGERS


def test_the_page_shows_what_the_model_predicts():
    shown = rows("| gradients with respect to | maps | A100 | H100 | 4090 |")
    wanted = {}
    for name, size in SIZES.items():
        for dtype in ("float32", "float16", "bfloat16"):
            times = [microseconds(RAFT, flowing(size, "constant"), dtype, gpu) for gpu in SHOWN]
            for result, pair in zip(("both maps", "coords"), zip(*times, strict=True), strict=True):
                wanted[f"{result}, {name}", dtype] = tuple(f"{time:.0f}" for time in pair)
    assert shown == wanted


def test_the_page_shows_what_a_step_on_tensor_cores_takes():
    shown = rows("| 16 items of a warp, 256 channels: cycles | A100 | H100 | 4090 |")
    products, wanted = STEP_ITEMS * TARGETS * STEP_CHANNELS, []
    for gpu in SHOWN:
        device = DEVICES[gpu]
        issued = (products / LANES + STEP_ITEMS * lookup_grads_plan.ITEM) * LANES / ISSUE
        units = max(products / device.multiply_adds, issued)
        matrices = [parts * products / matrix_rate(device) for parts in PARTS.values()]
        integers, every = INTEGERS * LANES / INTEGER_RATE, STEP * LANES / ISSUE
        wanted.append((f"{units:.0f}", ", ".join(f"{cycles:.0f}" for cycles in matrices),
                       f"{integers:.0f}; {every:.0f}"))  # fmt: skip
    assert list(shown.values()) == list(zip(*wanted, strict=True))


def test_few_items_are_not_needed():
    coords = flowing((64, 64), "constant")
    needed = RAFT.levels * 64 * 64 * 100 / 8  # at most: less where windows leave the map
    cells = RAFT.level_sizes(64, 64)
    for at_once in (AT_ONCE[4], STEP_ITEMS):
        assert count_fmap1(RAFT, coords, cells, at_once).items < 1.2 * needed
        assert count_levels(RAFT, coords, cells, at_once, (1,) * 4).items < 1.2 * needed
