"""The tiles that plans choose, and those that the model ranks behind them."""

from functools import partial

import pytest
from devices import DEVICES, LAYERS

from cupycorr.cuda import plan as cuda_plan
from cupycorr.cuda import tiles as cuda_tiles
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


def test_where_no_more_tiles_fit_the_plain_kernels_are_planned():
    kernels = {launch.kernel for launch in launches("FlowNetC", "H100", rank=100_000)}
    assert kernels == {f"plain_{result}" for result in RESULTS}
