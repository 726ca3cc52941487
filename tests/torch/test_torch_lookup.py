"""The lookup on torch tensors: values, derivatives, tracing, transforms, autocast."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import cupycorr
from cupycorr import CorrelationLookup, Lookup
from cupycorr.torch.lookup import fields_of

LOOKUPS = {
    "two levels": Lookup(1, 2),
    "stereo": Lookup((0, 1), 2, pool=(1, 2)),
    "dilated, x first": Lookup((1, 0), dilation_patch=(2, 1), order="xy"),
}
lookups = pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
OPS = torch.ops.cupycorr


def tensors(dtype=torch.float64, grad=True, batch=2):
    """Return maps, and coordinates between the cells."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    fmap1, fmap2 = random(batch, 2, 3, 2), random(batch, 2, 4, 5)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    coords = torch.randint(-1, 4, (batch, 2, 3, 2), generator=generator).to(wide) + 0.375
    if grad:
        for tensor in (fmap1, fmap2, coords):
            tensor.requires_grad_()
    return fmap1, fmap2, coords


def volume(batch=2):
    """Return a volume for those coordinates."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 2, 4, 5, generator=generator, dtype=torch.float64)


@lookups
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_tensors_give_what_arrays_give(lookup, dtype):
    maps = tensors(dtype)
    cost = cupycorr.correlation_lookup(*maps, lookup)
    grad = torch.randn(cost.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    grads = torch.autograd.grad(cost, maps, grad)
    arrays = [tensor.detach() for tensor in (*maps, grad)]
    if dtype is torch.bfloat16:
        ml_dtypes = pytest.importorskip("ml_dtypes")
        bits = (tensor.contiguous() for tensor in arrays)
        arrays = [
            tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            if tensor.dtype is dtype
            else tensor.numpy()
            for tensor in bits
        ]
    else:
        arrays = [tensor.numpy() for tensor in arrays]
    *given, upstream = arrays
    want = cupycorr.correlation_lookup(*given, lookup)
    np.testing.assert_array_equal(cost.detach().double().numpy(), want.astype(float))
    want = cupycorr.correlation_lookup_vjp(upstream, *given, lookup, needs=(True, True, True))
    for one, other in zip(grads, want, strict=True):
        np.testing.assert_array_equal(one.double().numpy(), other.astype(float))


@lookups
def test_first_and_second_derivatives(lookup):
    fmap1, fmap2, coords = tensors()
    assert gradcheck(
        lambda *maps: cupycorr.correlation_lookup(*maps, lookup), (fmap1, fmap2, coords)
    )
    fixed = coords.detach()
    assert gradgradcheck(
        lambda *maps: cupycorr.correlation_lookup(*maps, fixed, lookup), (fmap1, fmap2)
    )


@lookups
def test_first_and_second_derivatives_of_samples(lookup):
    whole, coords = volume().requires_grad_(), tensors()[2]
    assert gradcheck(lambda *given: cupycorr.volume_lookup(*given, lookup), (whole, coords))
    fixed = coords.detach()
    assert gradgradcheck(lambda one: cupycorr.volume_lookup(one, fixed, lookup), (whole,))


def test_second_derivatives_by_coords_are_refused():
    fmap1, fmap2, coords = tensors()
    cost = cupycorr.correlation_lookup(fmap1, fmap2, coords, Lookup(1))
    (grad,) = torch.autograd.grad(cost.sum(), coords, create_graph=True)
    with pytest.raises(RuntimeError, match="coords must be detached for second derivatives"):
        grad.sum().backward()


def test_edges_share_maps():
    fmap1, fmap2, _ = tensors()
    lookup, index1, index2 = Lookup(1, 2), torch.tensor([1, 0, 1, 1]), torch.tensor([0, 0, 1, 0])
    coords = torch.rand(4, 2, 3, 2, dtype=torch.float64) * 4
    indices = {"index1": index1, "index2": index2}
    cost = cupycorr.correlation_lookup(fmap1, fmap2, coords, lookup, **indices)
    grads = torch.autograd.grad(cost.square().sum(), (fmap1, fmap2))
    plain = cupycorr.correlation_lookup(fmap1[index1], fmap2[index2], coords, lookup)
    want = torch.autograd.grad(plain.square().sum(), (fmap1, fmap2))
    torch.testing.assert_close(cost, plain)
    for one, other in zip(grads, want, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(IndexError, match="index2 must be at least 0 and below 2, got 0 to 2"):
        cupycorr.correlation_lookup(
            fmap1, fmap2, coords, lookup, index1=index1, index2=torch.tensor([0, 0, 1, 2])
        )


@lookups
def test_operators_are_as_torch_expects_them(lookup):
    fmap1, fmap2, coords = tensors()
    levels = [level.detach().requires_grad_() for level in cupycorr.pyramid(fmap2, lookup)]
    indices = torch.tensor([1, 0]), None
    arguments = (fmap1, levels, coords, *indices, *fields_of(lookup, 0.5))
    cost = OPS.lookup(*arguments)
    fixed = (fmap1, levels, coords.detach(), *indices, *fields_of(lookup, 0.5))
    opcheck(OPS.lookup.default, arguments)
    opcheck(OPS.lookup_grads.default, (cost.detach(), *fixed, [True, True, False]))
    opcheck(OPS.pyramid.default, (fmap2, lookup.levels, lookup.pool))
    opcheck(OPS.pyramid_grads.default, (levels, lookup.pool))
    whole = [level.detach().requires_grad_() for level in cupycorr.volume_pyramid(volume(), lookup)]
    patch = lookup.radius, lookup.dilation_patch, lookup.pool, lookup.x_first
    opcheck(OPS.volume_lookup.default, (whole, coords, *patch))
    samples = OPS.volume_lookup(whole, coords, *patch).detach()
    given = (samples, whole, coords.detach(), *patch, [True, False])
    opcheck(OPS.volume_lookup_grads.default, given)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_lookups_are_the_same(dynamic):
    module, maps = CorrelationLookup(1, 2), tensors()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        maps = tensors(batch=batch)
        one, other = compiled(*maps), module(*maps)
        assert torch.equal(one, other)
        for grad, want in zip(
            torch.autograd.grad(one.sum(), maps),
            torch.autograd.grad(other.sum(), maps),
            strict=True,
        ):
            assert torch.equal(grad, want)


def test_exported_lookups_take_other_sizes():
    module, maps = CorrelationLookup(1, 2), tensors(grad=False)
    dim = torch.export.Dim
    batch, size = dim("batch"), {2: dim("height"), 3: dim("width")}
    shapes = {
        "fmap1": {0: batch, **size},
        "fmap2": {0: batch, 2: dim("height2", min=4), 3: dim("width2", min=4)},
        "coords": {0: batch, **size},
    }
    program = torch.export.export(module, maps, dynamic_shapes=shapes)
    maps = torch.ones(3, 2, 4, 5), torch.ones(3, 2, 7, 6), torch.ones(3, 2, 4, 5)
    maps = [tensor.double() for tensor in maps]
    assert torch.equal(program.module()(*maps), module(*maps))


def test_batches_of_vmap_are_folded():
    lookup, maps = Lookup(1, 2), tensors(grad=False)
    index = torch.tensor([1, 0])
    batched = [torch.stack([tensor, tensor.flip(0)], 1) for tensor in maps]

    def cost(fmap1, fmap2, coords, index1):
        return cupycorr.correlation_lookup(fmap1, fmap2, coords, lookup, index1=index1)

    got = torch.vmap(cost, (1, 1, 1, None))(*batched, index)
    assert torch.equal(got[0], cost(*maps, index))
    assert torch.equal(got[1], cost(*(tensor.flip(0) for tensor in maps), index))
    sums = torch.func.grad(lambda *given: cost(*given, index).sum())
    got = torch.vmap(sums, (1, 1, 1))(*batched)
    assert torch.equal(got[0], sums(*maps))

    whole = torch.stack([volume(), volume().flip(0)], 1)
    got = torch.vmap(lambda *given: cupycorr.volume_lookup(*given, lookup), (1, 1))(
        whole, batched[2]
    )
    assert torch.equal(got[0], cupycorr.volume_lookup(volume(), maps[2], lookup))


def test_tangents_are_those_of_linear_maps():
    lookup, (fmap1, fmap2, coords) = Lookup(1, 2), tensors(grad=False)
    change1, change2 = torch.randn_like(fmap1), torch.randn_like(fmap2)

    def cost(*maps):
        return cupycorr.correlation_lookup(*maps, coords, lookup)

    _, tangent = torch.func.jvp(cost, (fmap1, fmap2), (change1, change2))
    torch.testing.assert_close(tangent, cost(change1, fmap2) + cost(fmap1, change2))

    def gradient(*maps):
        return torch.func.grad(lambda *given: cost(*given).square().sum(), argnums=(0, 1))(*maps)

    _, tangents = torch.func.jvp(gradient, (fmap1, fmap2), (change1, change2))
    step = 1e-6
    high, low = (
        gradient(fmap1 + sign * step * change1, fmap2 + sign * step * change2) for sign in (1, -1)
    )
    for tangent, one, other in zip(tangents, high, low, strict=True):
        torch.testing.assert_close(tangent, (one - other) / (2 * step), rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="coords must have no tangent"):
        torch.func.jvp(
            lambda at: cupycorr.correlation_lookup(fmap1, fmap2, at, lookup), (coords,), (coords,)
        )


def test_autocast_leaves_coords_alone():
    module, maps = CorrelationLookup(1, 2), tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        levels = module.pyramid(maps[1])
        cost = module(*maps)
        assert torch.equal(cost, module(maps[0], levels, maps[2]))
    assert {level.dtype for level in levels} == {cost.dtype} == {torch.bfloat16}
    narrow = (maps[0].bfloat16(), maps[1].bfloat16(), maps[2])
    assert torch.equal(cost, module(*narrow))


def test_fx_traces_the_module():
    module, maps = CorrelationLookup(1, 2), tensors(grad=False)
    assert torch.equal(torch.fx.symbolic_trace(module)(*maps), module(*maps))


def test_the_module_shows_and_keeps_what_it_was_given():
    module = CorrelationLookup(4, 4, order="xy", scale=0.5)
    assert repr(module) == "CorrelationLookup(radius=4, levels=4, order='xy', scale=0.5)"
    assert not module.state_dict()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"coords": lambda c: c.float()}, TypeError, "coords must have dtype float64"),
        ({"fmap2": lambda f: f.to_sparse()}, TypeError, "must be dense tensors"),
        ({"coords": lambda c: c[:, :1]}, ValueError, r"shapes \(N, C, \*P\)"),
        ({"coords": lambda c: c.to("meta")}, ValueError, "one device"),
    ],
)
def test_errors_say_what_is_wrong(change, error, message):
    given = dict(zip(("fmap1", "fmap2", "coords"), tensors(grad=False), strict=True))
    for name, how in change.items():
        given[name] = how(given[name])
    with pytest.raises(error, match=message):
        cupycorr.correlation_lookup(**given, lookup=Lookup(1))


def test_an_operator_refuses_what_does_not_fit():
    fmap1, fmap2, coords = tensors(grad=False)
    rest = (None, None, *fields_of(Lookup(1), 1.0))
    with pytest.raises(ValueError, match="channels of fmap1"):
        OPS.lookup(fmap1, [fmap2[:, :1]], coords, *rest)
    cost = OPS.lookup(fmap1, [fmap2], coords, *rest)
    with pytest.raises(ValueError, match="grad_cost must have the cost's shape"):
        OPS.lookup_grads(cost[:1], fmap1, [fmap2], coords, *rest, [True, True, False])
