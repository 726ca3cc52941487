"""Torch tensors in plain use: values, gradients, memory, modes, autocast."""

import pytest
from cases import CASES, GEOMETRIES
from tensors import DTYPES, GEOMETRY, SHAPE, Dispatched, difference, integers, pair

import cupycorr
from cupycorr import Geometry, verify
from cupycorr.cpu import engine as numpy_engine

torch = pytest.importorskip("torch")

from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

GRADCHECKED = (
    "even patch, dilated",
    "window at the border",
    "stride not dividing dilation_patch",
    "one-sided displacements",
    "negative padding, window",
    "no samples",
    "no channels",
)


@pytest.fixture
def calls(monkeypatch):
    """Record the arguments of the engine's calls, which do their work nevertheless."""
    recorded, run = [], numpy_engine.run

    def record(what, arrays, layer, **options):
        recorded.append((what, arrays, options))
        run(what, arrays, layer, **options)

    monkeypatch.setattr(numpy_engine, "run", record)
    return recorded


class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", CASES)
    def test_values_and_gradients_are_those_of_the_definition(self, case, dtype):
        checks = verify.check(
            verify.torch_engine(), *CASES[case], dtype, oracle=verify.definition()
        )
        assert [check for check in checks if check.error is not None] == []

    @pytest.mark.parametrize("case", CASES)
    def test_the_dispatcher_gives_the_same_cost(self, case):
        shape, geometry = GEOMETRIES[case]
        maps = integers(shape), integers(shape, seed=1)
        want = cupycorr.correlation(*maps, geometry, normalize=True)
        with Dispatched() as mode:
            got = cupycorr.correlation(*maps, geometry, normalize=True)
        assert "cupycorr.cost.default" in mode.operators
        assert not difference(got, want)

    @pytest.mark.parametrize("case", CASES)
    def test_the_dispatcher_gives_the_same_gradients(self, case):
        shape, geometry = GEOMETRIES[case]
        maps = pair(shape, differentiable=True)
        grad = integers(geometry.cost_shape(shape), seed=2)
        want = torch.autograd.grad(cupycorr.correlation(*maps, geometry), maps, grad)
        with Dispatched() as mode:
            got = torch.autograd.grad(cupycorr.correlation(*maps, geometry), maps, grad)
        assert "cupycorr.grads.default" in mode.operators
        assert not difference(got, want)

    def test_infinities_reach_only_the_outputs_that_touch_them(self):
        fmap = torch.zeros(1, 1, 5, 5)
        fmap[0, 0, 0, 0] = torch.inf
        cost = cupycorr.correlation(fmap, torch.ones_like(fmap), Geometry(patch_size=3))
        assert torch.isfinite(cost).sum() == cost.numel() - 4


class TestGradients:
    @pytest.mark.parametrize("case", GRADCHECKED)
    def test_gradients_agree_with_finite_differences(self, case):
        shape, geometry = GEOMETRIES[case]
        assert gradcheck(
            lambda *maps: cupycorr.correlation(*maps, geometry, normalize=True),
            tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)),
            check_forward_ad=True,
            check_batched_grad=0 not in shape,
            check_batched_forward_grad=0 not in shape,
            fast_mode=True,
        )

    @pytest.mark.parametrize("case", GRADCHECKED)
    def test_second_derivatives_agree_with_finite_differences(self, case):
        shape, geometry = GEOMETRIES[case]
        assert gradgradcheck(
            lambda *maps: cupycorr.correlation(*maps, geometry, normalize=True),
            tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)),
            check_fwd_over_rev=True,
            check_batched_grad=0 not in shape,
            fast_mode=True,
        )

    @pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
    def test_every_entry_agrees_with_finite_differences(self, check):
        maps = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        assert check(lambda *maps: cupycorr.correlation(*maps, GEOMETRY), tuple(maps))

    def test_the_third_derivative_is_that_of_the_cube(self):
        fmap = integers((1, 1, 2, 2), differentiable=True)
        other = integers((1, 1, 2, 2), seed=1)
        result = cupycorr.correlation(fmap, other, Geometry()).pow(3).sum()
        for _ in range(3):
            (result,) = torch.autograd.grad(result.sum(), fmap, create_graph=True)
        assert not difference(result, 6 * other**3)

    @pytest.mark.parametrize("wanted", [0, 1])
    def test_only_the_requested_gradient_is_computed(self, wanted, calls):
        maps = [integers(seed=i, differentiable=i == wanted) for i in range(2)]
        cupycorr.correlation(*maps, GEOMETRY).sum().backward()
        _, arrays, _ = calls[-1]
        grads = [name for name in arrays if name.startswith("grad_fmap")]
        assert grads == [f"grad_fmap{wanted + 1}"]
        assert maps[1 - wanted].grad is None

    @pytest.mark.parametrize("wanted", [0, 1])
    def test_only_what_the_requested_gradient_needs_is_kept(self, wanted):
        maps, kept = [integers(seed=i, differentiable=i == wanted) for i in range(2)], []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
            cupycorr.correlation(*maps, GEOMETRY)
        assert [tensor.data_ptr() for tensor in kept] == [maps[1 - wanted].data_ptr()]

    def test_both_gradients_are_computed_in_one_call(self, calls):
        maps = pair(differentiable=True)
        cupycorr.correlation(*maps, GEOMETRY).sum().backward()
        assert len(calls) == 2

    def test_one_map_with_itself_gets_the_sum_of_both_gradients(self):
        fmap = integers(differentiable=True)
        grad = integers(GEOMETRY.cost_shape(SHAPE), seed=1)
        (got,) = torch.autograd.grad(cupycorr.correlation(fmap, fmap, GEOMETRY), fmap, grad)
        numbers = (t.detach().numpy() for t in (grad, fmap, fmap))
        grad1, grad2 = cupycorr.correlation_vjp(*numbers, GEOMETRY)
        assert not difference(got, torch.from_numpy(grad1 + grad2))

    def test_checkpointed_gradients_are_the_same(self):
        maps = pair(differentiable=True)
        want = torch.autograd.grad(cupycorr.correlation(*maps, GEOMETRY).square().sum(), maps)
        cost = checkpoint(
            lambda *maps: cupycorr.correlation(*maps, GEOMETRY), *maps, use_reentrant=False
        )
        got = torch.autograd.grad(cost.square().sum(), maps)
        assert not difference(got, want)


def layouts(tensor):
    """Return tensors of other strides, by name."""
    return {
        "contiguous": tensor,
        "channels last": tensor.to(memory_format=torch.channels_last),
        "every second column": tensor.repeat_interleave(2, dim=3)[..., ::2],
        "with an offset": torch.cat([tensor, tensor])[1:-1],
        "one sample repeated": tensor[:1].expand(4, -1, -1, -1),
        "transposed": tensor.mT,
    }


def same_memory(array, tensor):
    strides = tuple(n * tensor.element_size() for n in tensor.stride())
    place = array.__array_interface__["data"][0], array.shape, array.strides
    return place == (tensor.data_ptr(), tuple(tensor.shape), strides)


class TestMemory:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_engine_reads_and_writes_the_tensors_memory(self, dtype, calls):
        fmap1, fmap2 = integers(dtype=dtype), integers(dtype=dtype, seed=1)
        cost = cupycorr.correlation(fmap1, fmap2, GEOMETRY)
        ((_, arrays, _),) = calls
        tensors = {"fmap1": fmap1, "fmap2": fmap2, "cost": cost}
        assert arrays.keys() == tensors.keys()
        assert all(same_memory(arrays[name], tensor) for name, tensor in tensors.items())

    @pytest.mark.parametrize("layout", layouts(integers()))
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_no_layout_is_copied(self, layout, dtype, calls):
        fmap = layouts(integers(dtype=dtype))[layout]
        cupycorr.correlation(fmap, fmap, GEOMETRY)
        assert same_memory(calls[0][1]["fmap1"], fmap)

    @pytest.mark.parametrize("layout", layouts(integers()))
    def test_every_layout_gives_the_cost_of_a_copy(self, layout):
        fmap = layouts(integers())[layout]
        got = cupycorr.correlation(fmap, fmap, GEOMETRY)
        want = cupycorr.correlation(fmap.contiguous(), fmap.contiguous(), GEOMETRY)
        assert not difference(got, want)

    @pytest.mark.parametrize("layout", layouts(integers()))
    def test_costs_and_gradients_are_contiguous(self, layout):
        fmap = layouts(integers())[layout].detach().requires_grad_()
        cost = cupycorr.correlation(fmap, integers(fmap.shape), GEOMETRY)
        (grad,) = torch.autograd.grad(cost.sum(), fmap)
        assert cost.is_contiguous()
        assert grad.is_contiguous()

    def test_an_expanded_upstream_gradient_is_not_copied(self, calls):
        fmap = integers(differentiable=True)
        cost = cupycorr.correlation(fmap, integers(seed=1), GEOMETRY)
        cost.backward(torch.ones((), dtype=cost.dtype).expand(cost.shape))
        assert set(calls[-1][1]["grad_cost"].strides) == {0}

    def test_a_lazily_negated_map_is_negated(self):
        numbers = torch.complex(*pair()).conj()
        assert numbers.imag.is_neg()
        got = cupycorr.correlation(numbers.imag, integers(), GEOMETRY)
        assert not difference(got, -cupycorr.correlation(integers(seed=1), integers(), GEOMETRY))

    def test_as_many_threads_as_torch_uses_are_used(self, calls):
        cupycorr.correlation(integers(), integers(), GEOMETRY)
        assert calls[0][-1]["threads"] == torch.get_num_threads()


class TestModes:
    def test_parameters_may_be_compared_without_gradients(self):
        parameter = torch.nn.Parameter(integers())
        with torch.no_grad():
            cost = cupycorr.correlation(parameter, parameter, GEOMETRY)
        assert not cost.requires_grad
        assert not difference(cost, cupycorr.correlation(integers(), integers(), GEOMETRY))

    def test_inference_mode_makes_inference_tensors(self):
        with torch.inference_mode():
            cost = cupycorr.correlation(integers(), integers(), GEOMETRY)
        assert cost.is_inference()

    def test_subclasses_make_subclasses(self):
        class Features(torch.Tensor):
            pass

        cost = cupycorr.correlation(integers().as_subclass(Features), integers(), GEOMETRY)
        assert type(cost) is Features

    def test_torch_function_modes_see_the_operator(self):
        seen = []

        class Recorder(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        with Recorder():
            cupycorr.correlation(integers(), integers(), GEOMETRY)
        assert torch.ops.cupycorr.cost.default in seen

    def test_tensors_of_other_devices_are_refused(self):
        with torch._subclasses.FakeTensorMode():
            maps = [torch.empty(SHAPE, device="mps") for _ in range(2)]
            with pytest.raises(RuntimeError, match=r"on a CUDA device, got mps(:0)?; move them"):
                cupycorr.correlation(*maps, GEOMETRY)

    def test_cuda_tensors_without_values_give_results_there(self):
        with torch._subclasses.FakeTensorMode():
            maps = [torch.empty(SHAPE, device="cuda") for _ in range(2)]
            cost = cupycorr.correlation(*maps, GEOMETRY)
            assert (cost.shape, cost.device) == (GEOMETRY.cost_shape(SHAPE), maps[0].device)

    def test_sparse_tensors_are_refused(self):
        with pytest.raises(TypeError, match="must be dense tensors"):
            cupycorr.correlation(integers().to_sparse(), integers(), GEOMETRY)


class TestAutocast:
    @pytest.mark.parametrize("inside", ["float16", "bfloat16"])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_maps_are_cast_to_the_dtype_of_the_region(self, dtype, inside):
        with torch.autocast("cpu", getattr(torch, inside)):
            cost = cupycorr.correlation(
                integers(dtype=dtype), integers(dtype="float32", seed=1), GEOMETRY
            )
        maps = integers(dtype=inside), integers(dtype=inside, seed=1)
        assert not difference(cost, cupycorr.correlation(*maps, GEOMETRY))

    @pytest.mark.parametrize("inside", ["float16", "bfloat16"])
    def test_the_bare_operator_casts_too(self, inside):
        arguments = integers(dtype="float32"), integers(dtype="float32"), *[[1, 1]] * 7, False
        with torch.autocast("cpu", getattr(torch, inside)):
            cost = torch.ops.cupycorr.cost(*arguments)
        assert cost.dtype == getattr(torch, inside)

    def test_double_precision_stays(self):
        with torch.autocast("cpu", torch.bfloat16):
            cost = cupycorr.correlation(*pair(), GEOMETRY)
        assert not difference(cost, cupycorr.correlation(*pair(), GEOMETRY))

    def test_sums_are_accumulated_in_single_precision(self):
        fmap = torch.ones(1, 1000, 1, 1)  # bfloat16 sums of ones would stop at 256
        with torch.autocast("cpu", torch.bfloat16):
            cost = cupycorr.correlation(fmap, fmap, Geometry())
        assert not difference(cost, torch.full_like(cost, 1000))

    def test_gradients_have_the_dtype_of_the_maps(self):
        maps = pair(dtype="float32", differentiable=True)
        with torch.autocast("cpu", torch.bfloat16):
            cost = cupycorr.correlation(*maps, GEOMETRY)
        assert {grad.dtype for grad in torch.autograd.grad(cost.sum(), maps)} == {torch.float32}

    @pytest.mark.parametrize("mode", [torch.enable_grad, Dispatched])
    def test_derivatives_of_a_full_precision_cost_stay_in_full_precision(self, mode):
        def second_derivatives():
            maps = pair(dtype="float32", differentiable=True)
            cost = cupycorr.correlation(*maps, GEOMETRY)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                grads = torch.autograd.grad(cost.pow(2).sum(), maps, create_graph=True)
                # bfloat16 cannot hold the integer 257.
                return torch.autograd.grad(257 * grads[0].sum(), maps)

        inside = False
        want = second_derivatives()
        inside = True
        with mode():
            assert not difference(second_derivatives(), want)
