"""Every check of `verify_lookup` accepts what is right and catches a planted error."""

import lookup_cases
import lookup_definition
import numpy as np
import pytest

from cupycorr import Lookup, verify
from cupycorr import verify_lookup as checks
from cupycorr.layer import DTYPES

CORRECT = checks.numpy_engine()
SHAPE = (2, 3, 9, 11)
LOOKUP = Lookup((1, 2), 3)
SQUARE = Lookup(2, 2)
EXACT = [f"{name} exact on integers" for name in ("cost", "grad_fmap1", "grad_fmap2")]


def failed(engine, dtype="float32", lookup=LOOKUP, shape=SHAPE):
    """Return the names of the checks that an engine fails."""
    return [one.name for one in checks.check(engine, shape, lookup, dtype) if one.error is not None]


def literal(**functions):
    """Return the literal loops as an engine."""

    def levels(fmap2, lookup, dtype):
        result = [fmap2]
        for _ in range(1, lookup.levels):
            one = Lookup(0, 2, pool=lookup.pool)
            result.append(verify.round_to(lookup_definition.pyramid(result[-1], one)[1], dtype))
        return tuple(result)

    def given(operands, lookup, dtype):
        fmap1, fmap2, coords, scale, *_ = operands
        maps = fmap2 if isinstance(fmap2, tuple) else levels(fmap2, lookup, dtype)
        coords = coords.astype("float64" if dtype == "float64" else "float32")
        return fmap1, maps, coords, lookup, fmap1.shape[1] ** -0.5 if scale is None else scale

    def cost(operands, lookup, dtype):
        result = lookup_definition.cost(*given(operands, lookup, dtype), *operands[4:])
        return verify.round_to(result, dtype)

    def grads(grad, operands, lookup, dtype):
        arrays = given(operands, lookup, dtype)
        grad1, grads2, grad3 = lookup_definition.grads(grad, *arrays, *operands[4:])
        grad2 = [verify.round_to(one, dtype) for one in grads2]
        is_levels = isinstance(operands.fmap2, tuple)
        grad2 = tuple(grad2) if is_levels else lookup_definition.pyramid_vjp(grad2, lookup)
        wide = "float64" if dtype == "float64" else "float32"
        grad2 = grad2 if is_levels else verify.round_to(grad2, dtype)
        return verify.round_to(grad1, dtype), grad2, verify.round_to(grad3, wide)

    return checks.Engine("loops", levels, cost, grads)._replace(**functions)


# The whole check.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lookup",
    [LOOKUP, Lookup((0, 3), 2, pool=(1, 2), order="xy"), Lookup(1, 2, (2, 3), 3), Lookup(1, 2)],
    ids=repr,
)
def test_the_correct_engine_is_accepted(lookup, dtype):
    assert failed(CORRECT, dtype, lookup) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors_are_accepted(dtype):
    pytest.importorskip("torch")
    assert failed(checks.torch_engine(), dtype) == []


def test_the_literal_loops_are_accepted():
    assert failed(literal(), "float64", SQUARE, (2, 2, 5, 6)) == []


def test_pools_of_three_cells_are_checked_by_round_off_alone():
    names = [one.name for one in checks.check(CORRECT, SHAPE, Lookup(1, 2, pool=3), "float64")]
    assert names
    assert all("round-off" in name for name in names)


@pytest.mark.parametrize("levels", [1, 4, 5])
def test_sums_of_the_exact_maps_are_exact_in_float32(levels):
    lookup, shape = Lookup(4, levels), (1, 64, 32, 33)
    chance = checks._chance(shape, lookup, "float32")
    assert 0 < chance < 1
    rng = np.random.default_rng(0)
    operands = checks._exact_operands("", shape, lookup, chance, rng)
    names = [name for name in DTYPES if name in ("float32", "float64")]
    single, double = (CORRECT.cost(operands, lookup, name) for name in names)
    assert single.any()
    assert verify.difference(single, double) is None


# Planted errors.


def test_a_transposed_patch_is_caught():
    def cost(operands, lookup, dtype):
        return CORRECT.cost(operands, lookup, dtype).swapaxes(2, 3)

    assert EXACT[0] in failed(CORRECT._replace(cost=cost), lookup=SQUARE)


def test_a_transposed_radius_is_caught():
    def cost(operands, lookup, dtype):
        wrong = Lookup(lookup.radius[::-1], lookup.levels, order="xy")
        return CORRECT.cost(operands, wrong, dtype)

    assert EXACT[0] in failed(CORRECT._replace(cost=cost))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_default_of_the_scale_is_caught(dtype):
    def scaled(operands):
        scale = 1 / operands.fmap1.shape[1] if operands.scale is None else operands.scale
        return operands._replace(scale=scale)

    def cost(operands, *rest):
        return CORRECT.cost(scaled(operands), *rest)

    def grads(grad, operands, *rest):
        return CORRECT.grads(grad, scaled(operands), *rest)

    wrong = failed(CORRECT._replace(cost=cost, grads=grads), dtype)
    maps = ("grad_fmap1", *(f"grad_fmap2, level {level}," for level in range(3)), "grad_coords")
    assert wrong == [f"{name} round-off" for name in ("cost", *maps)]


@pytest.mark.parametrize("scale", [1.0, None])
def test_a_scale_that_is_not_asked_for_is_caught(scale):
    def cost(operands, *rest):
        return CORRECT.cost(operands._replace(scale=scale), *rest)

    assert EXACT[0] in failed(CORRECT._replace(cost=cost))


def test_coordinates_that_no_level_divides_are_caught():
    def cost(operands, lookup, dtype):
        maps = operands.fmap2
        maps = maps if isinstance(maps, tuple) else CORRECT.pyramid(maps, lookup, dtype)
        single = Lookup(lookup.radius)
        parts = [CORRECT.cost(operands._replace(fmap2=(one,)), single, dtype) for one in maps]
        return np.concatenate(parts, 1)

    assert EXACT[0] in failed(CORRECT._replace(cost=cost))


def test_a_gradient_of_coords_by_the_levels_own_cells_is_caught():
    def grads(grad, operands, lookup, dtype):
        grad1, grad2, total = CORRECT.grads(grad, operands, lookup, dtype)
        for level in range(1, lookup.levels):
            alone = np.zeros_like(grad)
            alone[:, level] = grad[:, level]
            total = total + CORRECT.grads(alone, operands, lookup, dtype)[2] * (2**level - 1)
        return grad1, grad2, total

    wrong = failed(CORRECT._replace(grads=grads))
    assert "grad_coords exact on integers" in wrong
    assert "grad_coords round-off" in wrong


def test_a_gradient_of_levels_that_is_not_divided_is_caught():
    def grads(grad, operands, lookup, dtype):
        grad1, grad2, grad3 = CORRECT.grads(grad, operands, lookup, dtype)
        if not isinstance(grad2, tuple):
            given = operands._replace(fmap2=CORRECT.pyramid(operands.fmap2, lookup, dtype))
            levels = CORRECT.grads(grad, given, lookup, dtype)[1]
            grad2 = levels[0].copy()
            for level, one in enumerate(levels[1:], 1):
                wide = one.repeat(2**level, 2).repeat(2**level, 3)
                grad2[:, :, : wide.shape[2], : wide.shape[3]] += wide
        return grad1, grad2, grad3

    wrong = failed(CORRECT._replace(grads=grads))
    assert {"grad_fmap2 exact on integers", "adjoint identity"} <= set(wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_coordinates_in_half_are_caught(dtype):
    def cost(operands, *rest):
        coords = np.clip(operands.coords, -6e4, 6e4).astype(np.float16).astype(np.float64)
        return CORRECT.cost(operands._replace(coords=coords), *rest)

    assert "cost round-off" in failed(CORRECT._replace(cost=cost), dtype)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_row_or_a_column_before_the_first_that_is_the_last_is_caught(monkeypatch, axis):
    def inside(array, *cell):
        # Index -1 of an array is its last.
        least = [0, 0]
        least[axis] = -1
        return all(least[a] <= cell[a] < array.shape[a] for a in (0, 1))

    monkeypatch.setattr(lookup_definition, "_inside", inside)
    wrong = failed(literal(), "float64", Lookup(1), (1, 2, 5, 6))
    assert {*EXACT[:2], "grad_coords exact on integers"} <= set(wrong)


@pytest.mark.parametrize("which", [1, 2])
def test_a_gradient_that_is_assigned_instead_of_added_is_caught(which):
    def grads(grad, operands, lookup, dtype):
        results = list(CORRECT.grads(grad, operands, lookup, dtype))
        index = operands[3 + which]
        if index is not None:
            wrong = np.zeros_like(results[which - 1])
            for entry, number in enumerate(index):
                one = operands._replace(
                    coords=operands.coords[[entry]],
                    index1=operands.index1[[entry]],
                    index2=operands.index2[[entry]],
                )
                alone = CORRECT.grads(grad[[entry]], one, lookup, dtype)
                wrong[number] = alone[which - 1][number]
            results[which - 1] = wrong
        return tuple(results)

    wrong = failed(CORRECT._replace(grads=grads))
    assert wrong == [f"grad_fmap{which} exact on integers, edges", "adjoint identity, edges"]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_number_where_coordinates_are_none_is_caught(value):
    def cost(*arguments):
        return np.nan_to_num(CORRECT.cost(*arguments), nan=value)

    wrong = failed(CORRECT._replace(cost=cost))
    assert wrong == ["cost exact on integers, coordinates beyond all maps"]


def test_levels_of_larger_sizes_are_caught():
    def pyramid(fmap2, lookup, dtype):
        wide = np.pad(fmap2, ((0, 0), (0, 0), (0, 3), (0, 3)))
        return (fmap2, *CORRECT.pyramid(wide, lookup, dtype)[1:])

    wrong = failed(CORRECT._replace(pyramid=pyramid))
    assert {"level 1 exact on integers", "level 1 round-off"} <= set(wrong)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_sums_are_caught(dtype):
    def cost(operands, lookup, kind):
        total = 0.0
        for c in range(operands.fmap1.shape[1]):
            fmap1 = operands.fmap1[:, [c]]
            fmap2 = tuple(level[:, [c]] for level in operands.fmap2)
            scale = operands.fmap1.shape[1] ** -0.5
            one = operands._replace(fmap1=fmap1, fmap2=fmap2, scale=scale)
            total = verify.round_to(total + CORRECT.cost(one, lookup, kind), dtype)
        return total

    def cost_of_levels(operands, *rest):
        is_levels = isinstance(operands.fmap2, tuple)
        return (cost if is_levels else CORRECT.cost)(operands, *rest)

    engine = CORRECT._replace(cost=cost_of_levels)
    assert failed(engine, dtype, Lookup(1), (1, 200, 4, 5)) == ["cost round-off"]


# The oracle has an oracle.


@pytest.mark.parametrize(
    "name", ["outside", "four levels", "edges of patches", "dilated", "tokens"]
)
def test_the_definition_agrees_with_the_literal_loops(name):
    fmap1, levels, coords, indices = lookup_cases.arguments(name)
    for index, maps in zip(indices.values(), (fmap1, levels[0]), strict=False):
        index %= len(maps)
    lookup = lookup_cases.CASES[name].lookup
    grad = np.random.default_rng(1).integers(-2, 3, lookup.cost_shape(fmap1.shape, coords.shape))
    grad = grad.astype(float)
    for maps in (levels[0], tuple(levels)):
        operands = checks.Operands(fmap1, maps, coords, 0.5, **indices)
        got, want = (
            (
                one.cost(operands, lookup, "float64"),
                *one.grads(grad, operands, lookup, "float64"),
            )
            for one in (checks.definition(), literal())
        )
        for one, other in zip(got, want, strict=True):
            pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
            assert [verify.difference(*pair) for pair in pairs] == [None] * (
                len(levels) if isinstance(one, tuple) else 1
            )
