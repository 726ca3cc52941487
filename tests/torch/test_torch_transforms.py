"""The operators of torch, their batches, and their derivatives in all modes."""

import pytest
from tensors import COST_SHAPE, GEOMETRY, SHAPE, SMALL, cost, cubes, difference, integers, pair

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwad  # noqa: E402
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap  # noqa: E402

import cupycorr.torch  # noqa: E402, F401 - defines the operators

FIELDS = (
    *(GEOMETRY.kernel_size, GEOMETRY.patch_size, GEOMETRY.stride, GEOMETRY.padding),
    *(GEOMETRY.dilation, GEOMETRY.dilation_patch, GEOMETRY.first_displacement, True),
)
OPERATORS = {
    "cost": (SHAPE, SHAPE),
    "grad_fmap1": (SHAPE, COST_SHAPE),
    "grad_fmap2": (SHAPE, COST_SHAPE),
    "grads": (SHAPE, SHAPE, COST_SHAPE),
}


def operator(name):
    return getattr(torch.ops.cupycorr, name).default


def operands(name, differentiable=False, dtype="float32"):
    return tuple(
        integers(shape, dtype, seed, differentiable) for seed, shape in enumerate(OPERATORS[name])
    )


class TestOperators:
    @pytest.mark.parametrize("differentiable", [False, True])
    @pytest.mark.parametrize("name", OPERATORS)
    def test_torch_finds_nothing_wrong_with_them(self, name, differentiable):
        arguments = operands(name, differentiable), FIELDS
        torch.library.opcheck(operator(name), (*arguments[0], *arguments[1]))

    @pytest.mark.parametrize("name", OPERATORS)
    def test_their_derivatives_agree_with_finite_differences(self, name):
        assert torch.autograd.gradcheck(
            lambda *maps: operator(name)(*maps, *FIELDS),
            operands(name, differentiable=True, dtype="float64"),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            fast_mode=True,
        )

    @pytest.mark.parametrize("name", OPERATORS)
    def test_their_second_derivatives_agree_with_finite_differences(self, name):
        assert torch.autograd.gradgradcheck(
            lambda *maps: operator(name)(*maps, *FIELDS),
            operands(name, differentiable=True, dtype="float64"),
            check_fwd_over_rev=True,
            fast_mode=True,
        )

    @pytest.mark.parametrize("wrong", range(3))
    @pytest.mark.parametrize("name", OPERATORS)
    def test_they_refuse_operands_that_do_not_fit(self, name, wrong):
        maps = list(operands(name))
        wrong %= len(maps)
        maps[wrong] = maps[wrong][..., 1:]
        with pytest.raises(ValueError, match=f"operands of cupycorr::{name} must have the shapes"):
            operator(name)(*maps, *FIELDS)

    @pytest.mark.parametrize("dtype", ["float64", "int32"])
    @pytest.mark.parametrize("name", OPERATORS)
    def test_they_refuse_other_dtypes(self, name, dtype):
        maps = [*operands(name)[:-1], operands(name, dtype=dtype)[-1]]
        with pytest.raises(TypeError, match=f"operands of cupycorr::{name} must have one dtype"):
            operator(name)(*maps, *FIELDS)

    @pytest.mark.parametrize("name", OPERATORS)
    def test_they_refuse_maps_that_are_not_four_dimensional(self, name):
        maps = [tensor[0] for tensor in operands(name)]
        with pytest.raises(ValueError, match="must be maps of shape"):
            operator(name)(*maps, *FIELDS)


BATCHES = {"first": (0, None), "second": (None, 0), "both": (0, 0), "inner": (1, 2), "last": (4, 0)}


def batch(dim, seed):
    """Return a map, or if ``dim`` is not None three along that dimension."""
    return integers(seed=seed) if dim is None else integers((3, *SHAPE), seed=seed).movedim(0, dim)


def looped(function, in_dims, *maps):
    """Return what vmap is to return, by a loop."""
    results = [
        function(*(m if d is None else m.select(d, i) for m, d in zip(maps, in_dims, strict=True)))
        for i in range(3)
    ]
    return torch.stack(results)


class TestFunc:
    @pytest.mark.parametrize("in_dims", BATCHES.values(), ids=BATCHES)
    def test_vmap_is_a_loop(self, in_dims):
        maps = [batch(dim, seed) for seed, dim in enumerate(in_dims)]
        assert not difference(vmap(cost, in_dims)(*maps), looped(cost, in_dims, *maps))

    @pytest.mark.parametrize("in_dims", BATCHES.values(), ids=BATCHES)
    @pytest.mark.parametrize("argument", [0, 1])
    def test_vmap_of_a_gradient_is_a_loop(self, argument, in_dims):
        maps = [batch(dim, seed) for seed, dim in enumerate(in_dims)]
        gradient = grad(cubes, argument)
        assert not difference(vmap(gradient, in_dims)(*maps), looped(gradient, in_dims, *maps))

    def test_nested_vmap_is_a_nested_loop(self):
        maps = integers((3, *SHAPE)), integers((3, *SHAPE), seed=1)
        got = vmap(vmap(cost, (None, 0)), (0, None))(*maps)
        assert not difference(
            got, torch.stack([vmap(cost, (None, 0))(m, maps[1]) for m in maps[0]])
        )

    def test_vmap_takes_maps_without_samples(self):
        maps = integers((3, 0, *SHAPE[1:])), integers((0, *SHAPE[1:]))
        assert vmap(cost, (0, None))(*maps).shape == (3, 0, *COST_SHAPE[1:])

    def test_vmap_takes_an_empty_batch(self):
        assert vmap(cost, (0, None))(integers((0, *SHAPE)), integers()).shape == (0, *COST_SHAPE)

    def test_gradients_inside_a_batch_stay_apart(self):
        maps = [m.requires_grad_() for m in (integers((3, *SHAPE)), integers((3, *SHAPE), seed=1))]
        got = torch.autograd.grad(vmap(cubes)(*maps).sum(), maps)
        assert not difference(got, torch.autograd.grad(looped(cubes, (0, 0), *maps).sum(), maps))

    @pytest.mark.parametrize("argument", [0, 1])
    def test_grad_is_the_gradient_of_autograd(self, argument):
        maps = pair(differentiable=True)
        want = torch.autograd.grad(cubes(*maps), maps)[argument]
        assert not difference(grad(cubes, argument)(*pair()), want)

    def test_vjp_gives_both_gradients(self):
        maps, upstream = pair(differentiable=True), integers(COST_SHAPE, seed=2)
        want = torch.autograd.grad(cost(*maps), maps, upstream)
        assert not difference(vjp(cost, *pair())[1](upstream), want)

    def test_jvp_is_the_product_rule(self):
        maps, (t1, t2) = pair(), (integers(seed=2), integers(seed=3))
        got = jvp(cost, maps, (t1, t2))
        assert not difference(got, (cost(*maps), cost(t1, maps[1]) + cost(maps[0], t2)))

    def test_linearize_gives_the_same_tangents(self):
        maps, tangents = pair(), (integers(seed=2), integers(seed=3))
        got, push = linearize(cost, *maps)
        assert not difference((got, push(*tangents)), jvp(cost, maps, tangents))

    @pytest.mark.parametrize("argument", [0, 1])
    def test_jvp_takes_a_tangent_of_one_map(self, argument):
        maps, tangent = list(pair()), integers(seed=2)
        other = maps[1 - argument]

        def of_one(fmap):
            return cost(fmap, other) if argument == 0 else cost(other, fmap)

        got = jvp(of_one, (maps[argument],), (tangent,))[1]
        assert not difference(got, of_one(tangent))

    @pytest.mark.parametrize("argument", [0, 1])
    def test_jacobians_of_both_modes_agree(self, argument):
        maps = pair((1, 2, 4, 4))
        assert not difference(jacfwd(cost, argument)(*maps), jacrev(cost, argument)(*maps))

    @pytest.mark.parametrize("inner", [jacfwd, jacrev])
    @pytest.mark.parametrize("outer", [jacfwd, jacrev])
    @pytest.mark.parametrize("arguments", [(0, 0), (0, 1), (1, 0), (1, 1)])
    def test_hessians_of_all_modes_are_that_of_autograd(self, arguments, outer, inner):
        maps = pair(SMALL)
        want = torch.autograd.functional.hessian(cubes, maps)[arguments[0]][arguments[1]]
        got = outer(inner(cubes, arguments[0]), arguments[1])(*maps)
        assert not difference(got, want)

    def test_hessian_is_that_of_autograd(self):
        fmap1, fmap2 = pair(SMALL)
        want = torch.autograd.functional.hessian(lambda fmap: cubes(fmap, fmap2), fmap1)
        assert not difference(hessian(cubes)(fmap1, fmap2), want)

    def test_third_derivatives_of_all_modes_agree(self):
        maps = pair((1, 1, 2, 2))
        got = jacfwd(jacrev(jacrev(cubes), 1))(*maps)
        assert not difference(got, jacrev(jacfwd(jacrev(cubes), 1))(*maps))

    def test_gradients_may_be_taken_of_a_penalty_on_gradients(self):
        def penalty(fmap1, fmap2):
            return grad(cubes)(fmap1, fmap2).square().sum()

        maps = pair(differentiable=True)
        (inner,) = torch.autograd.grad(cubes(*maps), maps[:1], create_graph=True)
        want = torch.autograd.grad(inner.square().sum(), maps)
        assert not difference(grad(penalty, (0, 1))(*pair()), want)


class TestForwardMode:
    def test_a_dual_map_makes_a_dual_cost(self):
        (fmap1, fmap2), tangent = pair(), integers(seed=2)
        with fwad.dual_level():
            result = fwad.unpack_dual(cost(fwad.make_dual(fmap1, tangent), fmap2))
        assert not difference(result.primal, cost(fmap1, fmap2))
        assert not difference(result.tangent, cost(tangent, fmap2))

    def test_a_gradient_of_a_dual_map_has_a_tangent(self):
        (fmap1, fmap2), tangent = pair(differentiable=True), integers(seed=2)
        with fwad.dual_level():
            dual = fwad.make_dual(fmap1, tangent)
            (gradient,) = torch.autograd.grad(cost(dual, fmap2).sum(), fmap2)
            got = fwad.unpack_dual(gradient).tangent
        (want,) = torch.autograd.grad(cost(tangent, fmap2).sum(), fmap2)
        assert not difference(got, want)

    def test_a_tangent_is_differentiable(self):
        (fmap1, fmap2), tangent = pair(differentiable=True), integers(seed=2)
        with fwad.dual_level():
            got = fwad.unpack_dual(cost(fwad.make_dual(fmap1, tangent), fmap2)).tangent
            (got,) = torch.autograd.grad(got.square().sum(), fmap2)
        (want,) = torch.autograd.grad(cost(tangent, fmap2).square().sum(), fmap2)
        assert not difference(got, want)
