"""What torch makes of the operators without their values: graphs, programs, traces, shapes."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tensors import COST_SHAPE, SHAPE, SMALL, cost, cubes, difference, integers, pair

import cupycorr
from cupycorr import Geometry, SpatialCorrelationSampler

torch = pytest.importorskip("torch")

from torch.export import Dim, export  # noqa: E402
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap  # noqa: E402

# What torch warns of while it compiles and traces is not about this package.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture
def compiled():
    """Compile a function whole; forget all that was compiled before."""
    torch._dynamo.reset()
    yield lambda function, **options: torch.compile(
        function, fullgraph=True, **{"backend": "aot_eager"} | options
    )
    torch.compiler.set_stance("default")


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

    def test_batches_of_dynamic_shapes_need_one_compilation(self, compiled):
        function = compiled(vmap(cost, (0, None)), dynamic=True)
        for batch, shape in ((4, (2, 3, 5, 6)), (5, (3, 4, 7, 9)), (8, (6, 2, 11, 10))):
            maps = integers((batch, *shape)), integers(shape, seed=1)
            assert not difference(function(*maps), vmap(cost, (0, None))(*maps))
            torch.compiler.set_stance("fail_on_recompile")

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
        batched = transform not in (grad, jacfwd, jacrev, hessian)
        maps = integers((2, *SMALL) if batched else SMALL), integers(SMALL, seed=1)
        assert not difference(compiled(transform(cubes))(*maps), transform(cubes)(*maps))

    def test_jvp_inside_is_the_same(self, compiled):
        def tangent(fmap1, fmap2):
            return jvp(cost, (fmap1, fmap2), (fmap2, fmap1))

        assert not difference(compiled(tangent)(*pair()), tangent(*pair()))

    def test_compiled_autograd_gives_the_same_gradients(self, compiled):
        maps = pair(differentiable=True)
        want = torch.autograd.grad(cubes(*maps), maps)
        result = cubes(*maps)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            result.backward()
        assert not difference([m.grad for m in maps], want)

    @pytest.mark.slow
    def test_the_first_call_of_a_process_may_be_compiled(self):
        program = (
            "import torch, cupycorr; fmap = torch.ones(1, 2, 3, 4);"
            "sample = torch.compile(cupycorr.spatial_correlation_sample, fullgraph=True,"
            " backend='eager');"
            "print(sample(fmap, fmap, 1, 3).shape)"
        )
        root = Path(cupycorr.__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=root
        )
        assert done.stdout == "torch.Size([1, 3, 3, 3, 4])\n", done.stderr

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
    def test_inductor_generates_code_for_both_passes(self, compiled):
        maps = pair(dtype="float32", differentiable=True)
        got = torch.autograd.grad(compiled(cubes, backend="inductor")(*maps), maps)
        assert not difference(got, torch.autograd.grad(cubes(*maps), maps))

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
    @pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="inductor 2.6 compares sizes")
    def test_inductor_takes_other_sizes_without_compiling_again(self, compiled):
        function = compiled(cubes, backend="inductor", dynamic=True)
        for shape in ((2, 3, 5, 6), (3, 3, 7, 9), (4, 2, 11, 8)):
            maps = pair(shape, "float32", differentiable=True)
            got = torch.autograd.grad(function(*maps), maps)
            assert not difference(got, torch.autograd.grad(cubes(*maps), maps))
            torch.compiler.set_stance("fail_on_recompile")

    def test_a_window_that_does_not_fit_is_refused(self, compiled):
        # torch 2.6 says of an error in traced code only that there was one.
        with pytest.raises(Exception, match=r"must fit into the padded image|Observed exception"):
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

    def test_a_trace_before_autograd_holds_the_operator_alone(self):
        graph = torch.fx.experimental.proxy_tensor.make_fx(cost, pre_dispatch=True)(*pair())
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert called == [torch.ops.cupycorr.cost.default]


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
