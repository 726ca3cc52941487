"""Absolute differences of torch tensors: values, derivatives, graphs."""

import cases
import pytest
from tensors import DTYPES, GEOMETRY, SHAPE, Dispatched, difference, integers, pair

import cupycorr
from cupycorr import Geometry, verify

torch = pytest.importorskip("torch")

from torch.autograd import gradcheck, gradgradcheck  # noqa: E402

UNEVEN = Geometry(2, (3, 2), padding=1, stride=(1, 2))


def l1(fmap1, fmap2, geometry=UNEVEN):
    return cupycorr.correlation(fmap1, fmap2, geometry, similarity="l1")


def maps(*shape):
    """Return two maps, no two values of which are equal, that require gradients."""
    values = torch.randperm(2 * torch.Size(shape).numel(), generator=torch.manual_seed(0))
    one, two = (values.double() / len(values)).view(2, *shape)
    return one.requires_grad_(), two.requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.CASES)
def test_values_and_gradients_are_those_of_the_definition(case, dtype):
    engine, oracle = verify.torch_engine(), verify.definition()
    checks = verify.check(engine, *cases.l1(cases.CASES[case]), dtype, oracle=oracle)
    assert [check for check in checks if check.error is not None] == []


def test_gradients_agree_with_finite_differences_in_both_modes():
    assert gradcheck(l1, maps(2, 3, 5, 6), check_forward_ad=True, check_batched_grad=True,
                     check_batched_forward_grad=True)  # fmt: skip


def test_second_derivatives_agree_with_finite_differences():
    # The second derivative of l1 itself is zero almost everywhere.
    def curved(fmap1, fmap2):
        return l1(fmap1 * fmap2, fmap2.sin() * fmap1).square()

    assert gradgradcheck(curved, maps(1, 2, 4, 5), check_fwd_over_rev=True)


@pytest.mark.parametrize("needed", [0, 1])
def test_a_single_gradient_is_that_of_both(needed):
    inputs = maps(2, 3, 5, 6)
    both = torch.autograd.grad(l1(*inputs).square().sum(), inputs)
    inputs[1 - needed].requires_grad_(False)
    (one,) = torch.autograd.grad(l1(*inputs).square().sum(), inputs[needed])
    assert not difference(one, both[needed])


@pytest.mark.parametrize(
    ("name", "operands"),
    [
        ("l1_cost", "fmap1 fmap2"),
        ("l1_tangent", "fmap1 fmap2 tangent1 tangent2"),
        ("l1_grads", "fmap1 fmap2 cost"),
        ("l1_grad_fmap1", "fmap1 fmap2 cost"),
        ("l1_grad_fmap2", "fmap1 fmap2 cost"),
    ],
)
def test_operators_pass_torchs_own_checks(name, operands):
    shapes = {"cost": GEOMETRY.cost_shape(SHAPE)}
    tensors = [
        integers(shapes.get(operand, SHAPE), seed=seed, differentiable=True)
        for seed, operand in enumerate(operands.split())
    ]
    operator = getattr(torch.ops.cupycorr, name).default
    fields = [getattr(GEOMETRY, argument.name) for argument in operator._schema.arguments
              if hasattr(GEOMETRY, argument.name)]  # fmt: skip
    results = torch.library.opcheck(operator, (*tensors, *fields, True))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_compiled_function_is_the_same():
    torch._dynamo.reset()
    compiled = torch.compile(l1, fullgraph=True, backend="aot_eager")
    inputs = pair(differentiable=True)
    assert not difference(compiled(*inputs), l1(*inputs))
    got, want = (
        torch.autograd.grad(function(*inputs).pow(3).sum(), inputs) for function in (compiled, l1)
    )
    assert not difference(got, want)


def test_the_dispatcher_gives_the_same():
    with Dispatched() as mode:
        got = l1(*pair())
    assert "cupycorr.l1_cost.default" in mode.operators
    assert not difference(got, l1(*pair()))


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
def test_vmap_is_a_loop(in_dims):
    stacks = [integers((4, *SHAPE), seed=s) if dim == 0 else integers(seed=s)
              for s, dim in enumerate(in_dims)]  # fmt: skip
    want = torch.stack([
        l1(*(stack[i] if dim == 0 else stack for stack, dim in zip(stacks, in_dims, strict=True)))
        for i in range(4)
    ])  # fmt: skip
    assert not difference(torch.func.vmap(l1, in_dims)(*stacks), want)


def test_autocast_computes_in_the_dtype_of_the_region():
    inputs = pair(dtype="float32")
    with torch.autocast("cpu", torch.bfloat16):
        cost = l1(*inputs)
        with Dispatched():
            dispatched = l1(*inputs)
    assert not difference(cost, l1(*pair(dtype="bfloat16")))
    assert not difference(dispatched, cost)


def test_meta_tensors_give_the_shape():
    cost = l1(*(tensor.to("meta") for tensor in pair()))
    assert cost.shape == UNEVEN.cost_shape(SHAPE)
