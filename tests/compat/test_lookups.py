"""The lookups of other systems against their own formulas, with volumes of all pairs.

Maps are small integers, coordinates eighths, and scales powers of two, so that all is exact.
"""

import math
from typing import NamedTuple

import pytest

import cupycorr
from cupycorr import compat, verify

torch = pytest.importorskip("torch")

from cupycorr.compat import (  # noqa: E402
    alt_cuda_corr,
    altcorr,
    blocks,
    corr_sampler,
    droid,
    local_corr,
    localcorr,
    ptlflow,
    raft,
    raft_stereo,
    torchvision,
)

RADIUS, LEVELS = 2, 2
STEPS = range(-RADIUS, RADIUS + 1)
WIDE = {"dtype": torch.float64}


def integers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(**WIDE)


def places(*shape, size, seed=9):
    """Return x and y in eighths, stacked in the axis of length 2; some are outside."""
    generator, axis = torch.Generator().manual_seed(seed), shape.index(2)
    single = [n for k, n in enumerate(shape) if k != axis]
    height, width = size
    bounds = (-16, 8 * width + 16), (-16, 8 * height + 16)
    xy = [torch.randint(*bound, single, generator=generator) / 8 for bound in bounds]
    return torch.stack(xy, axis).to(**WIDE)


def sample(volume, x, y):
    """Interpolate a map (..., H, W) of each position at its x and y (...); 0 outside."""
    height, width = volume.shape[-2:]
    total = 0
    for v, b in ((y.floor(), 1 - (y - y.floor())), (y.floor() + 1, y - y.floor())):
        for u, a in ((x.floor(), 1 - (x - x.floor())), (x.floor() + 1, x - x.floor())):
            inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
            cell = v.clamp(0, height - 1) * width + u.clamp(0, width - 1)
            value = volume.flatten(-2).gather(-1, cell.long()[..., None])[..., 0]
            total = total + torch.where(inside, a * b * value, 0.0)
    return total


def all_pairs(fmap1, fmap2):
    """Return the products of all pairs, (B, H1, W1, H2, W2), by sqrt(C)."""
    return torch.einsum("bchw,bcvu->bhwvu", fmap1, fmap2) / math.sqrt(fmap1.shape[1])


def pooled(volume, pool):
    whole = [size // p * p for size, p in zip(volume.shape[-2:], pool, strict=True)]
    volume = volume[..., : whole[0], : whole[1]]
    return volume.unflatten(-2, (-1, pool[0])).unflatten(-1, (-1, pool[1])).mean((-3, -1))


def raft_costs(fmap1, fmap2, coords):
    """RAFT's ``CorrBlock``: channels are levels, then x, then y."""
    volume, (x, y), channels = all_pairs(fmap1, fmap2), coords.unbind(1), []
    for level in range(LEVELS):
        channels += [
            sample(volume, x / 2**level + dx, y / 2**level + dy) for dx in STEPS for dy in STEPS
        ]
        volume = pooled(volume, (2, 2))
    return torch.stack(channels, 1)


def stereo_costs(fmap1, fmap2, coords, own_row=False):
    """RAFT-Stereo's blocks; "reg" looks into the own row, "alt" at y."""
    volume, (x, y), channels = all_pairs(fmap1, fmap2), coords.unbind(1), []
    if own_row:
        y = torch.arange(x.shape[1], **WIDE)[:, None].expand_as(x)
    for level in range(LEVELS):
        channels += [sample(volume, x / 2**level + dx, y) for dx in STEPS]
        volume = pooled(volume, (1, 2))
    return torch.stack(channels, 1)


def row_samples(volume, coords):
    """RAFT-Stereo's extension: samples of a volume, whose rows stand alone."""
    x = coords[:, 0]
    return torch.stack([sample(volume[..., None, :], x + dx, 0 * x) for dx in STEPS], 1)


def alternate_costs(fmap1, fmap2, coords):
    """RAFT's extension: channels-last maps, several places, no scale."""
    volume, channels = torch.einsum("bhwc,bvuc->bhwvu", fmap1, fmap2)[:, None], []
    volume = volume.expand(-1, coords.shape[1], -1, -1, -1, -1)
    x, y = coords.unbind(-1)
    channels = [sample(volume, x + dx, y + dy) for dx in STEPS for dy in STEPS]
    return torch.stack(channels, 2)


def edge_costs(fmap1, fmap2, coords):
    """DPVO's ``corr``: edges of patches, x first, no scale."""
    volume = torch.einsum("bechw,becvu->behwvu", fmap1[:, EDGES[0]], fmap2[:, EDGES[1]])
    x, y = coords.unbind(2)
    rows = [torch.stack([sample(volume, x + dx, y + dy) for dy in STEPS], 2) for dx in STEPS]
    return torch.stack(rows, 2)


def pixels(warp, size):
    """Return RoMa's coordinates, from -1 to 1, in pixels from the centre of the first."""
    return (warp + 1) * size / 2 - 0.5


def droid_costs(fmap1, fmap2, coords):
    """DROID-SLAM's ``CorrBlock``: RAFT's channels of each edge, of maps that are divided by 4."""
    volume = torch.einsum("bechw,becvu->behwvu", fmap1 / 4, fmap2 / 4)
    (x, y), channels = coords.unbind(-1), []
    for level in range(LEVELS):
        channels += [
            sample(volume, x / 2**level + dx, y / 2**level + dy) for dx in STEPS for dy in STEPS
        ]
        volume = pooled(volume, (2, 2))
    return torch.stack(channels, 2)


def droid_edge_costs(fmaps, coords):
    """DROID-SLAM's ``AltCorrBlock``."""
    return droid_costs(fmaps[:, EDGES[0]], fmaps[:, EDGES[1]], coords)


def roma_costs(feature0, feature1, warp):
    """RoMa's ``local_correlation``: y first, only feature0 has a gradient."""
    volume, (height, width) = all_pairs(feature0, feature1.detach()), feature1.shape[2:]
    x, y = pixels(warp[:, 0], width).detach(), pixels(warp[:, 1], height).detach()
    return torch.stack([sample(volume, x + dx, y + dy) for dy in STEPS for dx in STEPS], 1)


def point_costs(im_A, im_B, warp):
    """Points of fused-local-corr's ``local_corr``, in its own pixels, interpolated."""
    volume = torch.einsum("bpc,bvuc->bpvu", im_A, im_B)[:, :, None]
    volume = volume.expand(-1, -1, warp.shape[2], -1, -1)
    return sample(volume, warp[..., 0] - 0.5, warp[..., 1] - 0.5)


def normal_point_costs(im_A, im_B, warp):
    size = torch.tensor(im_B.shape[2:0:-1], **WIDE)
    return point_costs(im_A, im_B, (warp + 1) * size / 2)


def patches(net, coords, raw=False):
    """DPVO's ``patchify``; nothing by coords."""
    last = RADIUS + 1 if raw else RADIUS
    x, y = (coords[..., n].detach() for n in (0, 1))
    x, y = (x.floor(), y.floor()) if raw else (x, y)
    volume = net[:, None].expand(-1, x.shape[1], -1, -1, -1)
    x, y = (at[..., None].expand(volume.shape[:3]) for at in (x, y))
    steps = range(-RADIUS, last + 1)
    rows = [torch.stack([sample(volume, x + dx, y + dy) for dx in steps], -1) for dy in steps]
    return torch.stack(rows, -2)


def torchvision_costs(fmap1, fmap2, coords):
    block = torchvision.CorrBlock(num_levels=LEVELS, radius=RADIUS)
    block.build_pyramid(fmap1, fmap2)
    assert block.out_channels == LEVELS * len(STEPS) ** 2
    return block.index_pyramid(coords)


class Case(NamedTuple):
    """A system's function of two maps and coordinates, its formula, and its arguments."""

    ours: object
    formula: object
    arguments: tuple
    grads: tuple = (True, True, True)
    """Which arguments have a gradient there, or more than that here."""


def block(make):
    return lambda fmap1, fmap2, coords: make(fmap1, fmap2, LEVELS, RADIUS)(coords)


EDGES = torch.tensor([2, 0, 0, 1, 2]), torch.tensor([1, 1, 0, 0, 1])
FLOW = (
    integers(2, 4, 5, 7),
    integers(2, 4, 6, 9, seed=1),
    places(2, 2, 5, 7, size=(6, 9)),
)
STEREO = (
    integers(2, 4, 3, 7),
    integers(2, 4, 3, 9, seed=1),
    places(2, 2, 3, 7, size=(3, 9)),
)
LAST = (
    integers(2, 5, 7, 4),
    integers(2, 6, 9, 4, seed=1),
    places(2, 3, 5, 7, 2, size=(6, 9)),
)
GRAPH = (
    integers(2, 3, 4, 3, 3),
    integers(2, 2, 4, 6, 9, seed=1),
    places(2, 5, 2, 3, 3, size=(6, 9)),
)
FRAMES = integers(2, 3, 4, 6, 9), integers(2, 3, 4, 6, 9, seed=1)
MOVED = places(2, 3, 6, 9, 2, size=(6, 9)), places(2, 5, 6, 9, 2, size=(6, 9))
POINTS = (
    integers(3, 7, 4),
    integers(3, 4, 8, 4, seed=1),
    places(3, 7, 5, 2, size=(4, 8)),
)
# Of 4 x 8 pixels, so that eighths of what is normalised are multiples of a power of two.
NORMAL = (
    integers(3, 4, 4, 8),
    integers(3, 4, 4, 8, seed=1),
    places(3, 2, 4, 8, size=(1, 1)),
)
ROWS = integers(2, 3, 7, 9), places(2, 2, 3, 7, size=(3, 9))
ONLY = (True, False, False)
CASES = {
    "RAFT": Case(block(raft.CorrBlock), raft_costs, FLOW),
    "RAFT, alternate": Case(block(raft.AlternateCorrBlock), raft_costs, FLOW),
    "ptlflow": Case(block(ptlflow.get_corr_block), raft_costs, FLOW),
    "ptlflow, by later names": Case(
        lambda *maps: ptlflow.CorrBlock(*maps[:2], corr_levels=LEVELS, corr_radius=RADIUS)(
            maps[2], dilation=torch.ones(2, 1, 5, 7)
        ),
        raft_costs, FLOW,
    ),
    "localcorr": Case(block(localcorr.get_localcorr_block), raft_costs, FLOW),
    "torchvision": Case(torchvision_costs, raft_costs, FLOW),
    "alt_cuda_corr": Case(
        lambda *arguments: alt_cuda_corr.forward(*arguments, RADIUS)[0], alternate_costs, LAST
    ),
    "RAFT-Stereo, alt": Case(block(raft_stereo.PytorchAlternateCorrBlock1D), stereo_costs, STEREO),
    "RAFT-Stereo, reg": Case(
        block(raft_stereo.CorrBlock1D), lambda *a: stereo_costs(*a, own_row=True), STEREO
    ),
    "corr_sampler": Case(
        lambda *arguments: corr_sampler.forward(*arguments, RADIUS)[0], row_samples, ROWS,
        (True, False),
    ),
    "DPVO": Case(
        lambda *arguments: altcorr.corr(*arguments, *EDGES, radius=RADIUS), edge_costs, GRAPH
    ),
    "DROID-SLAM": Case(block(droid.CorrBlock), droid_costs, (*FRAMES, MOVED[0])),
    "DROID-SLAM, alternate": Case(
        lambda fmaps, coords: droid.AltCorrBlock(fmaps, LEVELS, RADIUS)(coords, *EDGES),
        droid_edge_costs, (FRAMES[0], MOVED[1]), (True, True),
    ),
    "RoMa": Case(
        lambda *maps: local_corr.local_correlation(*maps[:2], RADIUS, maps[2]),
        roma_costs, NORMAL, ONLY,
    ),
    "local_corr": Case(
        lambda *maps: local_corr.local_corr(*maps, mode="bilinear"), point_costs, POINTS
    ),
    "local_corr, normalised": Case(
        lambda *maps: local_corr.local_corr(*maps, "bilinear", True), normal_point_costs,
        (*POINTS[:2], places(3, 7, 5, 2, size=(1, 1))),
    ),
}  # fmt: skip


def differences(ours, formula, arguments, wanted):
    """Compare two functions and their gradients by some of their arguments, to the bit."""
    results = []
    for function in (ours, formula):
        inputs = [
            one.clone().requires_grad_(is_wanted)
            for one, is_wanted in zip(arguments, wanted, strict=True)
        ]
        cost = function(*inputs)
        grad = integers(*cost.shape, seed=5)
        grads = torch.autograd.grad(cost, [one for one in inputs if one.requires_grad], grad)
        results.append([one.detach().numpy() for one in (cost, *grads)])
    return [verify.difference(got, want) for got, want in zip(*results, strict=True)]


@pytest.fixture(params=[0, blocks.SMALL], ids=["on demand", "volume"])
def most_bytes(request, monkeypatch):
    """Let blocks hold no volume of all pairs, or a small one."""
    monkeypatch.setattr(blocks, "SMALL", request.param)
    return request.param


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("most_bytes")
def test_costs_and_gradients_are_the_systems(name):
    case = CASES[name]
    found = differences(case.ours, case.formula, case.arguments, case.grads)
    assert found == [None] * (1 + sum(case.grads))


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_patches_are_dpvos(mode):
    net, coords = integers(2, 3, 6, 9), places(2, 5, 2, size=(6, 9))
    found = differences(
        lambda net: altcorr.patchify(net, coords, RADIUS, mode),
        lambda net: patches(net, coords, raw=mode != "bilinear"),
        [net], [True],
    )  # fmt: skip
    assert found == [None, None]


def test_the_nearest_pixel_is_the_one_that_a_point_lies_in():
    im_A, im_B, warp = POINTS
    want = point_costs(im_A, im_B, warp.floor() + 0.5)
    got = local_corr.local_corr(im_A, im_B, warp)
    assert verify.difference(got.numpy(), want.numpy()) is None


def test_the_extensions_gradients_are_those_of_its_costs():
    maps = [fmap.clone().requires_grad_() for fmap in LAST[:2]]
    cost = alternate_costs(*maps, LAST[2])
    upstream = integers(*cost.shape, seed=3)
    wanted = *torch.autograd.grad(cost, maps, upstream), torch.zeros_like(LAST[2])
    got = alt_cuda_corr.backward(*LAST, upstream, RADIUS)
    assert [
        verify.difference(one.numpy(), other.numpy())
        for one, other in zip(got, wanted, strict=True)
    ] == [None] * 3


def test_the_samplers_gradient_is_that_of_its_samples():
    volume = ROWS[0].clone().requires_grad_()
    samples = row_samples(volume, ROWS[1])
    upstream = integers(*samples.shape, seed=3)
    (want,) = torch.autograd.grad(samples, volume, upstream)
    # RAFT-Stereo leaves y out.
    (got,) = corr_sampler.backward(ROWS[0], ROWS[1][:, :1], upstream, RADIUS)
    assert verify.difference(got.numpy(), want.numpy()) is None


def test_gradients_of_edges_that_are_dropped_are_missing():
    fmap1 = GRAPH[0].clone().requires_grad_()
    torch.manual_seed(0)
    kept = torch.rand(len(EDGES[0])) < 0.5
    assert kept.any()
    assert not kept.all()
    torch.manual_seed(0)
    altcorr.corr(fmap1, *GRAPH[1:], *EDGES, RADIUS, dropout=0.5).sum().backward()
    want = GRAPH[0].clone().requires_grad_()
    altcorr.corr(want, *GRAPH[1:], *EDGES, RADIUS)[:, kept].sum().backward()
    assert torch.equal(fmap1.grad, want.grad)


@pytest.mark.parametrize("index", [torch.tensor([False, True, True, False, True]), slice(1, 4)])
def test_a_block_of_edges_grows_and_shrinks(index):
    one, two = ([fmap[:1, part] for fmap in FRAMES] for part in (slice(2), slice(3)))
    block = droid.CorrBlock(*one, LEVELS, RADIUS)
    block = block.cat(droid.CorrBlock(*two, LEVELS, RADIUS))[index]
    fmaps = [torch.cat(both, 1)[:, index] for both in zip(one, two, strict=True)]
    coords = MOVED[1][:1, index]
    assert torch.equal(block(coords), droid_costs(*fmaps, coords))


# What RAFT returns is float32, whatever the maps are; others keep the maps' dtype.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["RAFT", "RAFT-Stereo, reg", "ptlflow", "torchvision"])
@pytest.mark.usefixtures("most_bytes")
def test_maps_and_coordinates_of_any_dtype_are_taken(name, dtype):
    case = CASES[name]
    got = case.ours(*(tensor.to(dtype) for tensor in case.arguments))
    wide = name.startswith("RAFT") and dtype in (torch.float16, torch.bfloat16)
    assert got.dtype == (torch.float32 if wide else dtype)
    rounded = [tensor.to(dtype).double() for tensor in case.arguments]
    assert torch.equal(got, case.formula(*rounded).to(dtype).to(got.dtype))


# Sums of 256 products of two values of 480 N(0, 1), by 16: some are beyond float16.
LARGE = [480 * torch.randn(1, 256, 8, 8, generator=torch.Generator().manual_seed(0))] * 2


@pytest.mark.parametrize(("name", "stays"), [("CorrBlock", False), ("AlternateCorrBlock", True)])
def test_under_autocast_the_alternate_block_stays_in_the_dtype_of_the_maps(name, stays):
    coords = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 2, indexing="xy"))[None]
    with torch.autocast("cpu", torch.float16):
        got = getattr(raft, name)(*LARGE)(coords)
    assert got.dtype is torch.float32
    assert bool(got.isfinite().all()) is stays


def test_under_autocast_edges_stay_in_the_dtype_of_the_maps():
    coords = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 2, indexing="xy"), -1)[None, None]
    with torch.autocast("cpu", torch.float16):
        blocks = droid.AltCorrBlock(torch.stack(LARGE, 1))
        got = blocks(coords, torch.tensor([0]), torch.tensor([1]))
    assert got.dtype is torch.float32
    assert got.isfinite().all()


@pytest.mark.parametrize("corr_mode", ["localcorr_triton", "localcorr_AUTO"])
def test_localcorrs_sampler_is_the_cost_volume(corr_mode):
    fmap1, fmap2 = integers(2, 4, 5, 7), integers(2, 4, 5, 7, seed=1)
    got = localcorr.get_localcorr_sampler(5, 2, corr_mode)(fmap1, fmap2)
    want = cupycorr.spatial_correlation_sample(fmap1, fmap2, patch_size=5, dilation_patch=2)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: localcorr.get_localcorr_sampler(8), "patch_size must be odd, got 8"),
        (
            lambda: localcorr.get_localcorr_sampler(corr_mode="allpairs"),
            "corr_mode must be one of localcorr_triton, .*, got 'allpairs'",
        ),
        (
            lambda: ptlflow.CorrBlock(*FLOW[:2], 1)(FLOW[2], torch.full((2, 1, 5, 7), 2.0)),
            "dilation must be 1 everywhere",
        ),
        (
            lambda: local_corr.local_corr(*POINTS, "bicubic"),
            "mode must be 'nearest' or 'bilinear', got 'bicubic'",
        ),
        (
            lambda: local_corr.local_correlation(*NORMAL[:2], 1, NORMAL[2], sample_mode="nearest"),
            "sample_mode must be 'bilinear', got 'nearest'",
        ),
        (
            lambda: local_corr.local_correlation(
                *NORMAL[:2], 1, NORMAL[2], padding_mode="border"
            ),
            "padding_mode must be 'zeros', got 'border'",
        ),
        (
            lambda: local_corr.local_correlation(NORMAL[0], FLOW[1], 1, NORMAL[2]),
            r"feature0 and feature1 must have equal sizes, got \(3, 4, 4, 8\) and \(2, 4, 6, 9\)",
        ),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Alternate:
    """A block that calls RAFT's extension, once per level."""

    def __init__(self, fmap1, fmap2, num_levels, radius):
        self.fmap1, self.radius = fmap1, radius
        self.levels = [fmap2]
        for _ in range(num_levels - 1):
            self.levels.append(torch.nn.functional.avg_pool2d(self.levels[-1], 2))

    def __call__(self, coords):
        import alt_cuda_corr as extension

        one, *levels = (f.permute(0, 2, 3, 1) for f in (self.fmap1, *self.levels))
        coords, costs = coords.permute(0, 2, 3, 1)[:, None], []
        for number, level in enumerate(levels):
            (cost,) = extension.forward(one, level, coords / 2**number, self.radius)
            costs.append(cost[:, 0])
        return torch.cat(costs, 1) / math.sqrt(one.shape[-1])


def test_programs_find_the_extension_and_can_train_on_it():
    with compat.stand_in_for("alt_cuda_corr"):
        found = differences(block(Alternate), raft_costs, FLOW, (True, True, True))
    assert found == [None] * 4


@pytest.mark.parametrize(
    "name", ["alt_cuda_corr", "altcorr", "corr_sampler", "local_corr", "localcorr"]
)
def test_a_stand_in_without_a_module_is_the_one_of_that_name(name):
    found = {}
    with compat.stand_in_for(name):
        exec(f"import {name} as found", found)
    assert found["found"].__spec__.loader_state is getattr(compat, name)


def test_rafts_own_module_can_be_replaced():
    found = {}
    with compat.stand_in_for("corr", compat.raft):
        exec("from corr import CorrBlock, AlternateCorrBlock", found)
    assert found["AlternateCorrBlock"] is raft.AlternateCorrBlock


class Loop(torch.nn.Module):
    """The loop of RAFT-like networks: encode, and look up and update some times."""

    def __init__(self, make_block):
        super().__init__()
        self.make_block = make_block
        self.features = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.update = torch.nn.Conv2d(LEVELS * len(STEPS) ** 2, 2, 3, padding=1)

    def forward(self, image1, image2):
        one, two = self.features(image1), self.features(image2)
        look_up = self.make_block(one, two, LEVELS, RADIUS)
        rows, columns = (torch.arange(n, dtype=one.dtype) for n in one.shape[2:])
        start = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))[None]
        coords = start.expand(one.shape[0], -1, -1, -1)
        for _ in range(3):
            coords = coords.detach()
            coords = coords + self.update(look_up(coords))
        return coords - start


def formula_block(fmap1, fmap2, num_levels, radius):
    return lambda coords: raft_costs(fmap1, fmap2, coords)


def flow_and_gradients(net, images):
    flow = net(*images)
    return flow.detach(), *torch.autograd.grad(flow.square().sum(), list(net.parameters()))


@pytest.fixture
def loop():
    torch.manual_seed(0)
    return Loop(raft.CorrBlock).double()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 2, 3, 20, 26, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "holds"),
    [
        (raft.CorrBlock, True),
        (raft.AlternateCorrBlock, False),
        (raft_stereo.CorrBlock1D, True),
        (raft_stereo.PytorchAlternateCorrBlock1D, False),
        (ptlflow.CorrBlock, True),
        (ptlflow.AlternateCorrBlock, False),
        (lambda *maps: localcorr.get_localcorr_block(*maps, 2, 2), False),
    ],
)
def test_only_blocks_of_all_pairs_hold_products_and_few(make, holds, most_bytes):
    one, two = torch.rand(2, 1, 4, 16, 24)
    holds = holds and most_bytes > 0
    block = make(one, two)
    assert bool(block.products) == holds
    assert bool(block.levels) != holds
    count = 384 * (24 if "1D" in type(block).__name__ else 384)
    blocks.SMALL = min(most_bytes, 4 * count - 1)
    assert not make(one, two).products
    assert not make(one.half(), two.half()).products
    with torch.autocast("cpu"):
        assert not make(one, two).products


def test_maps_of_one_row_are_looked_up_beside_it_too():
    one, two = integers(1, 4, 1, 5), integers(1, 4, 1, 9, seed=1)
    coords = places(1, 2, 1, 5, size=(1, 9)).clamp(-2, 3)
    holding, other = (
        make(one, two, 1, RADIUS) for make in (raft.CorrBlock, raft.AlternateCorrBlock)
    )
    assert holding.products
    assert other.levels
    assert torch.equal(holding(coords), other(coords))
    assert holding(coords).any()


@pytest.mark.parametrize("make", [raft.CorrBlock, raft_stereo.CorrBlock1D])
def test_blocks_that_hold_products_are_mapped_over_and_take_empty_batches(make):
    one, two = integers(3, 2, 4, 6, 16), integers(3, 2, 4, 6, 16, seed=1)
    coords = places(3, 2, 2, 6, 16, size=(6, 16))

    def costs(one, two, coords):
        block = make(one, two, LEVELS, RADIUS)
        assert block.products
        return block(coords)

    nothing = make(one[0, :0], two[0, :0], LEVELS, RADIUS)(coords[0, :0])
    assert nothing.shape[0] == 0
    want = torch.stack([costs(*of_one) for of_one in zip(one, two, coords, strict=True)])
    assert torch.equal(torch.func.vmap(costs)(one, two, coords), want)


@pytest.mark.usefixtures("most_bytes")
def test_a_network_computes_and_learns_the_same_with_either_block(loop, images):
    got = flow_and_gradients(loop, images)
    assert got[0].abs().max() > 0.1
    loop.make_block = formula_block
    want = flow_and_gradients(loop, images)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.slow
def test_a_network_with_the_block_compiles_to_one_graph(loop, images):
    torch._dynamo.reset()
    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*images), loop(*images), rtol=0, atol=1e-12)
