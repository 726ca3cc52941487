"""The tiles that plans choose, and those that the model ranks behind them."""

from functools import partial

import pytest
from devices import DEVICES, LAYERS

from cupycorr import Geometry
from cupycorr.cuda import plan as cuda_plan
from cupycorr.cuda import tiles as cuda_tiles
from cupycorr.cuda.cost import Device
from cupycorr.layer import Layer

RESULTS = ("cost", "grad_fmap1", "grad_fmap2")


def launches(name, device, **options):
    """Return the tiled launches of a layer; one for each result."""
    shape, geometry = LAYERS[name]
    plan = cuda_plan.plan(RESULTS, Layer(geometry), shape, "float32", DEVICES[device], **options)
    return [launch for launch in plan.launches if launch.source != "taps.cu"]


@pytest.mark.parametrize("device", ["2070S", "H100"])
@pytest.mark.parametrize("name", ["FlowNetC", "PWC-Net 6", "default"])
def test_tiles_of_higher_rank_are_others_and_slower_by_the_model(name, device):
    ranks = [launches(name, device, rank=rank) for rank in range(4)]
    assert ranks[0] == launches(name, device)
    for of_result in zip(*ranks, strict=True):
        cycles = [launch.cycles for launch in of_result]
        assert cycles == sorted(cycles)
        assert cycles[0] > 0
        assert len({launch.constants for launch in of_result}) == len(of_result)


@pytest.mark.parametrize("device", ["2070S", "A100", "H100"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_best_of_the_likely_tiles_is_about_the_best_of_all(name, device, monkeypatch):
    cycles = launches(name, device)[0].cycles
    every = partial(cuda_tiles._product_tiles, likely=False)
    monkeypatch.setattr(
        cuda_tiles, "_product_tiles", lambda problem, device, likely: every(problem, device)
    )
    cuda_tiles.product_tile.cache_clear()
    assert cycles <= 1.05 * launches(name, device)[0].cycles
    cuda_tiles.product_tile.cache_clear()


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((1, 64, 12, 16), Geometry(patch_size=11, dilation_patch=2)),
        ((1, 64, 16, 16), Geometry(patch_size=9)),
        ((1, 64, 16, 16), Geometry(3, 5, padding=1)),
    ],
    ids=["FlowNetC", "PWC-Net", "kernel 3"],
)
def test_small_layers_get_many_warps_and_share_their_channels_out(shape, geometry):
    # On a sixth of an RTX 2060. Few fat threads lose there: nothing hides what they wait for.
    device = Device(75, 5, 64 << 10, 64 << 10)
    plan = cuda_plan.plan(RESULTS, Layer(geometry), shape, "float32", device)
    product, *gradients = (launch for launch in plan.launches if launch.source != "taps.cu")
    for launch in (product, *gradients):
        blocks = -(-launch.blocks // device.multiprocessors)
        at_once = min(blocks, dict(launch.constants).get("resident", 2))
        assert at_once * launch.threads >= 8 * 32
    assert dict(product.constants)["chunk"] >= 8
    assert dict(product.constants)["channel_groups"] >= 2
    for launch in gradients:
        assert dict(launch.constants)["channel_groups"] >= 16
        assert dict(launch.constants)["channels"] <= 4


# Maps, and the patch that is compared.
SMALL = [
    *(((1, channels, size, size + 1), patch) for channels in (1, 2, 3, 16) for size in (1, 4, 30)
      for patch in (1, 3, 9)),
    ((1, 64, 4, 4), 9), ((4, 2, 128, 128), 3), ((1, 4, 64, 64), 1), ((8, 1, 16, 16), 5),
]  # fmt: skip


@pytest.mark.parametrize("device", ["2070S", "H100"])
@pytest.mark.parametrize("kernel", [1, 2])
def test_the_plain_kernels_are_planned_where_they_are_faster_and_only_there(kernel, device):
    taken = set()
    for shape, patch in SMALL:
        layer = Layer(Geometry(kernel, patch, padding=kernel // 2))
        plain, tiled, chosen = (
            cuda_plan.plan(("cost",), layer, shape, "float32", DEVICES[device], plain=plain)
            for plain in (True, False, None)
        )
        # A launch over taps has no cycles of its own: it makes tiles slower.
        if plain.launches[0].cycles < tiled.launches[0].cycles:
            assert chosen == plain
        elif kernel == 1:
            assert chosen == tiled
        taken.add(chosen.launches[0].source)
    assert kernel > 1 or taken == {"plain.cu", "product.cu"}


@pytest.mark.parametrize("device", ["2070S", "A100", "4090", "H100"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_networks_are_tiled(name, device):
    shape, geometry = LAYERS[name]
    for result, launch in zip(RESULTS, launches(name, device), strict=True):
        applies = cuda_plan.plan(
            (result,), Layer(geometry), shape, "float32", DEVICES[device], plain=False
        )
        assert launch.source in {one.source for one in applies.launches}


def test_where_no_more_tiles_fit_the_plain_kernels_are_planned():
    kernels = {launch.kernel for launch in launches("FlowNetC", "H100", rank=100_000)}
    assert kernels == {f"plain_{result}" for result in RESULTS}
