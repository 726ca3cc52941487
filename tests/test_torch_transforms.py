"""Torch transforms: batches, derivatives of all modes, compilers, exporters, tracers."""

import shutil
import warnings

import pytest
from tensors import GEOMETRY, SHAPE, difference, integers, pair

import cupycorr
from cupycorr import Geometry, SpatialCorrelationSampler

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwad  # noqa: E402
from torch.export import Dim, export  # noqa: E402
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap  # noqa: E402

FIELDS = (
    *(GEOMETRY.kernel_size, GEOMETRY.patch_size, GEOMETRY.stride, GEOMETRY.padding),
    *(GEOMETRY.dilation, GEOMETRY.dilation_patch, GEOMETRY.first_displacement, True),
)
COST_SHAPE = GEOMETRY.cost_shape(SHAPE)
OPERATORS = {
    "cost": (SHAPE, SHAPE),
    "grad_fmap1": (SHAPE, COST_SHAPE),
    "grad_fmap2": (SHAPE, COST_SHAPE),
    "grads": (SHAPE, SHAPE, COST_SHAPE),
}
SMALL = (1, 1, 3, 3)


def cost(fmap1, fmap2):
    return cupycorr.correlation(fmap1, fmap2, GEOMETRY)


def cubes(fmap1, fmap2):
    """Return a number that is cubic in both maps, so that it has many derivatives."""
    return cupycorr.correlation(fmap1, fmap2, Geometry(2, 3, padding=1)).pow(3).sum()


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


# What torch warns of while it compiles and traces is not about this package.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture
def compiled():
    """Compile a function whole; forget all that was compiled before."""
    torch._dynamo.reset()
    return lambda function, **options: torch.compile(
        function, fullgraph=True, **{"backend": "aot_eager"} | options
    )


class TestCompile:
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_the_cost_is_the_same(self, compiled, dynamic):
        assert not difference(compiled(cost, dynamic=dynamic)(*pair()), cost(*pair()))

    def test_the_module_compiles(self, compiled):
        module = SpatialCorrelationSampler(3, 3, 2, 1, 1, 2)
        assert not difference(compiled(module)(*pair()), module(*pair()))

    def test_the_function_of_raw_parameters_compiles(self, compiled):
        def sample(fmap1, fmap2):
            return cupycorr.spatial_correlation_sample(fmap1, fmap2, 1, (3, 5), dilation_patch=2)

        assert not difference(compiled(sample)(*pair()), sample(*pair()))

    @pytest.mark.parametrize("differentiable", [(True, False), (False, True), (True, True)])
    def test_gradients_are_the_same(self, compiled, differentiable):
        maps = [m.requires_grad_(d) for m, d in zip(pair(), differentiable, strict=True)]
        wanted = [m for m in maps if m.requires_grad]
        got = torch.autograd.grad(compiled(cubes)(*maps), wanted)
        assert not difference(got, torch.autograd.grad(cubes(*maps), wanted))

    def test_dynamic_shapes_need_one_compilation(self, compiled):
        count = 0

        def backend(graph, inputs):
            nonlocal count
            count += 1
            return graph

        function = compiled(cost, dynamic=True, backend=backend)
        for shape in ((2, 3, 5, 6), (3, 3, 7, 9), (4, 2, 11, 8)):
            assert not difference(function(*pair(shape)), cost(*pair(shape)))
        assert count == 1

    def test_the_graph_holds_the_operator_alone(self, compiled):
        graphs = []

        def backend(graph, inputs):
            graphs.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
            return graph

        compiled(cost, backend=backend)(*pair())
        assert graphs == [torch.ops.cupycorr.cost.default]

    def test_autocast_is_the_same(self, compiled):
        def inside(fmap1, fmap2):
            with torch.autocast("cpu", torch.bfloat16):
                return cost(fmap1, fmap2)

        maps = integers(dtype="float32"), integers(dtype="bfloat16", seed=1)
        assert not difference(compiled(inside)(*maps), inside(*maps))

    @pytest.mark.parametrize(
        "transform",
        [grad, jacfwd, jacrev, hessian, lambda function: vmap(function, (0, None))],
        ids=["grad", "jacfwd", "jacrev", "hessian", "vmap"],
    )
    def test_transforms_inside_are_the_same(self, compiled, transform):
        maps = (
            pair((2, *SMALL)) if transform not in (grad, jacfwd, jacrev, hessian) else pair(SMALL)
        )
        maps = (maps[0], integers(SMALL, seed=1))
        assert not difference(compiled(transform(cubes))(*maps), transform(cubes)(*maps))

    def test_jvp_inside_is_the_same(self, compiled):
        def tangent(fmap1, fmap2):
            return jvp(cost, (fmap1, fmap2), (fmap2, fmap1))

        assert not difference(compiled(tangent)(*pair()), tangent(*pair()))

    @pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
    def test_inductor_generates_code_for_both_passes(self, compiled):
        maps = pair(dtype="float32", differentiable=True)
        got = torch.autograd.grad(compiled(cubes, backend="inductor")(*maps), maps)
        assert not difference(got, torch.autograd.grad(cubes(*maps), maps))

    def test_a_window_that_does_not_fit_is_refused(self, compiled):
        with pytest.raises(Exception, match="must fit into the padded image"):
            compiled(lambda *maps: cupycorr.correlation(*maps, Geometry(9)))(*pair())


SIZES = {
    "hints": (Dim.AUTO, None, Dim.AUTO, Dim.AUTO),
    "names": (Dim("batch", min=1), None, Dim("height", min=3), Dim("width", min=4)),
}


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    def test_the_program_takes_maps_of_other_sizes(self, sizes, strict):
        module = SpatialCorrelationSampler(3, (3, 4), 2, 1, 1, 2)
        dynamic = {dim: size for dim, size in enumerate(sizes) if size is not None}
        program = export(module, pair(), dynamic_shapes=(dynamic, dynamic), strict=strict).module()
        maps = pair((4, 3, 9, 14))
        assert not difference(program(*maps), module(*maps))

    @pytest.mark.parametrize("strict", [False, True])
    def test_the_program_holds_the_operator(self, strict):
        program = export(SpatialCorrelationSampler(), pair(), strict=strict)
        assert torch.ops.cupycorr.cost.default in [node.target for node in program.graph.nodes]

    def test_the_program_is_the_same_after_a_file(self, tmp_path):
        module = SpatialCorrelationSampler(3, 3)
        torch.export.save(export(module, pair()), tmp_path / "program.pt2")
        program = torch.export.load(tmp_path / "program.pt2").module()
        assert not difference(program(*pair()), module(*pair()))

    def test_the_program_decomposes_into_itself(self):
        program = export(SpatialCorrelationSampler(), pair()).run_decompositions()
        assert torch.ops.cupycorr.cost.default in [node.target for node in program.graph.nodes]


class TestTraces:
    def test_jit_traces_take_maps_of_other_sizes(self):
        module = SpatialCorrelationSampler(3, 3, 2, 1, 1, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            trace = torch.jit.trace(module, pair())
        maps = pair((4, 3, 9, 14))
        assert not difference(trace(*maps), module(*maps))

    def test_jit_traces_are_differentiable(self):
        maps = pair(differentiable=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            trace = torch.jit.trace(cubes, pair())
        got = torch.autograd.grad(trace(*maps), maps)
        assert not difference(got, torch.autograd.grad(cubes(*maps), maps))

    @pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
    def test_make_fx_records_the_operator(self, mode):
        graph = torch.fx.experimental.proxy_tensor.make_fx(cost, tracing_mode=mode)(*pair())
        assert torch.ops.cupycorr.cost.default in [node.target for node in graph.graph.nodes]
        assert not difference(graph(*pair()), cost(*pair()))


class TestShapesOnly:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_meta_maps_make_a_meta_cost(self, dtype):
        got = cost(*(m.to("meta") for m in pair(dtype=dtype)))
        want = cost(*pair(dtype=dtype))
        assert (got.device.type, got.shape, got.dtype) == ("meta", want.shape, want.dtype)
        assert got.stride() == want.stride()

    def test_meta_maps_have_meta_gradients(self):
        maps = [m.to("meta").requires_grad_() for m in pair()]
        grads = torch.autograd.grad(cost(*maps).sum(), maps)
        assert [(g.device.type, g.shape) for g in grads] == [("meta", m.shape) for m in maps]

    def test_huge_maps_take_no_memory(self):
        fmap = torch.empty(1 << 20, 256, 480, 640, device="meta")
        got = cupycorr.correlation(fmap, fmap, Geometry(patch_size=21))
        assert got.shape == (1 << 20, 21, 21, 480, 640)

    def test_fake_maps_make_fake_costs_and_gradients(self):
        with torch._subclasses.FakeTensorMode() as mode:
            maps = [torch.empty(SHAPE, requires_grad=True) for _ in range(2)]
            result = cost(*maps)
            grads = torch.autograd.grad(result.sum(), maps)
        assert all(isinstance(t, torch._subclasses.FakeTensor) for t in (result, *grads))
        assert mode.static_shapes
        assert [tuple(t.shape) for t in (result, *grads)] == [COST_SHAPE, SHAPE, SHAPE]

    def test_a_window_that_does_not_fit_is_refused(self):
        fmap = torch.empty(SHAPE, device="meta")
        with pytest.raises(ValueError, match="must fit into the padded image"):
            cupycorr.correlation(fmap, fmap, Geometry(9))
