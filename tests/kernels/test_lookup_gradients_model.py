"""What the lookup's gradients do: counted as they run, and as kernels/README.md says."""

import ctypes

import host
import lookup_grads_host
import numpy as np
import nvrtc
import pytest
from host import SM_80
from lookup_grads_costs import AT_ONCE, ITEM, count_fmap1, count_levels, microseconds
from test_lookup_gradients_nvrtc import launches
from test_lookup_model import RAFT, SHOWN, SIZES, rows
from test_lookup_nvrtc import compiled

from cupycorr.lookup import Lookup

# A counter in the kernels: items that a warp adds.
COUNTED = (
    "using Sums = float",
    'extern "C" __attribute__((visibility("default"))) long counted;\nlong counted;\n'
    "using Sums = float",
    "    const auto at = *reinterpret_cast<const Pack<int, at_once>*>",
    "    counted += threadIdx.x % 32 == 0 ? at_once : 0;\n"
    "    const auto at = *reinterpret_cast<const Pack<int, at_once>*>",
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
@pytest.mark.parametrize(
    ("result", "kernel", "count"),
    [("grad_fmap1", "lookup_grad_fmap1", count_fmap1),
     ("grad_levels", "lookup_grad_levels", count_levels)],
)  # fmt: skip
def test_kernels_add_as_many_items_as_the_model_says(result, kernel, count, kind):
    lookup, size, channels, counters = Lookup(4, 3), (11, 21), 256, []
    coords = flowing(size, kind)
    cells = lookup.level_sizes(*size)
    maps = np.ones((1, channels, *size)), [np.ones((1, channels, *one)) for one in cells]
    grad = np.ones(lookup.cost_shape(maps[0].shape, (1, 2, *size)))

    def planned(plan):
        launch = next(launch for launch in plan.launches if launch.kernel == kernel)
        counters.append(ctypes.c_long.in_dll(host.build(launch, "run", COUNTED), "counted"))
        counters[0].value = 0
        return plan

    lookup_grads_host.grads(
        SM_80, grad, *maps, coords[None], lookup, results=(result,), patch=COUNTED, planned=planned
    )
    assert counters[0].value == count(lookup, coords, cells, AT_ONCE[4]).items


@pytest.mark.skipif(nvrtc.missing(*nvrtc.COMPILERS) is not None, reason="needs NVRTC")
def test_an_item_takes_the_instructions_of_the_model():
    launch = next(one for one in launches("A100", "float32") if one.kernel == "lookup_grad_fmap1")
    inner, _ = nvrtc.loops(compiled(launch, "A100"), lambda loop: not loop["I2F"] and loop["FFMA"])
    assert inner.total() - nvrtc.multiply_adds(inner) == AT_ONCE[4] * ITEM


def test_the_page_shows_what_the_model_predicts():
    shown = rows("| gradients with respect to | maps | A100 | H100 | 4090 |")
    wanted = {}
    for name, size in SIZES.items():
        for dtype in ("float32", "float16"):
            times = [microseconds(RAFT, flowing(size, "constant"), dtype, gpu) for gpu in SHOWN]
            for result, pair in zip(("both maps", "coords"), zip(*times, strict=True), strict=True):
                wanted[f"{result}, {name}", dtype] = tuple(f"{time:.0f}" for time in pair)
    assert shown == wanted


def test_few_items_are_not_needed():
    coords = flowing((64, 64), "constant")
    needed = RAFT.levels * 64 * 64 * 100 / 8  # at most: less where windows leave the map
    for count in (count_fmap1, count_levels):
        items = count(RAFT, coords, RAFT.level_sizes(64, 64), AT_ONCE[4]).items
        assert items < 1.2 * needed
