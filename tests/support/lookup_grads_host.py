"""Run the CUDA kernels of the lookup's gradients on the processor, as `host` runs the others."""

import host
import numpy as np
from lookup_cases import CASES, arguments
from lookup_host import run_plan

from cupycorr import verify
from cupycorr.cuda import lookup_grads_plan
from cupycorr.cuda.lookup_plan import Problem
from cupycorr.layer import DTYPES

SCALE = 0.25


def problem(name, seed=0):
    """Return an upstream gradient of small integers, the other arguments, and the indices."""
    fmap1, levels, coords, indices = arguments(name, seed)
    shape = CASES[name].lookup.cost_shape(fmap1.shape, coords.shape)
    grad = np.random.default_rng(seed + 1).integers(-2, 3, shape).astype(float)
    return (grad, fmap1, levels, coords), indices


def differences(got, want, dtype):
    """Describe how gradients differ from the definition's, by name."""
    want_fmap1, want_levels, want_coords = want
    pairs = {"grad_fmap1": (got["grad_fmap1"], verify.round_to(want_fmap1, dtype))}
    for number, (one, two) in enumerate(zip(got["grad_levels"], want_levels, strict=True)):
        pairs[f"grad_level{number}"] = one, verify.round_to(two, dtype)
    if "grad_coords" in got:
        pairs["grad_coords"] = got["grad_coords"], want_coords
    found = {name: verify.difference(*pair) for name, pair in pairs.items()}
    return {name: text for name, text in found.items() if text is not None}


def grads(
    device,
    grad,
    fmap1,
    levels,
    coords,
    lookup,
    scale=1.0,
    dtype="float32",
    *,
    index1=None,
    index2=None,
    last=True,
    plain=False,
    aligned=True,
    results=lookup_grads_plan.RESULTS,
    planned=None,
    **how,
):
    """Return the gradients in float64 by name, "grad_levels" as a list.

    ``last`` says whether maps, and the gradient of fmap1, lie in memory with their channels last,
    ``aligned`` whether arrays begin at multiples of 16 bytes, ``planned`` turns a plan into the one
    that is run, and ``how`` goes to `run_plan`.
    """
    mode, wide = how.get("mode", "run"), DTYPES[dtype].accumulator
    index = {"index1": index1, "index2": index2}
    given = {"fmap1": _lying(fmap1, last), "grad_cost": grad}
    given |= {f"level{number}": _lying(level, last) for number, level in enumerate(levels)}
    kinds = dict.fromkeys(given, dtype) | {"coords": wide}
    given["coords"] = coords
    for name, value in index.items():
        if value is not None:
            given[name], kinds[name] = value, str(value.dtype)
    problem = Problem(
        len(coords),
        (len(fmap1), len(levels[0])),
        fmap1.shape[1],
        fmap1.shape[2:],
        tuple(level.shape[2:] for level in levels),
        (last,) * (1 + len(levels)),
        next((kinds[name] for name in index if name in kinds), "int64"),
    )
    written = {"grad_fmap1": given["fmap1"].shape, "grad_coords": coords.shape}
    written = {name: shape for name, shape in written.items() if name in results}
    if "grad_levels" in results:
        for number, level in enumerate(levels):
            written[f"grad_level{number}"] = _lying(level, True).shape
    kinds |= dict.fromkeys(written, dtype) | {"grad_coords": wide}
    shapes = {name: value.shape for name, value in given.items()} | written
    arrays = {
        name: host._guarded(shape, kinds[name], aligned, mode) for name, shape in shapes.items()
    }
    for name, value in given.items():
        arrays[name].array[...] = value
    kept = {name: arrays[name].array.copy() for name in given}
    plan = lookup_grads_plan.plan_grads(
        results, problem, lookup, dtype, device,
        indexed=(index1 is not None, index2 is not None), last=last, aligned=aligned, plain=plain,
    )  # fmt: skip
    run_plan(plan if planned is None else planned(plan), arrays, dtype, scale, **how)
    host.check_arrays(arrays, kept)
    found = {name: arrays[name].array.astype(np.float64) for name in written}
    if last and "grad_fmap1" in found:
        found["grad_fmap1"] = np.moveaxis(found["grad_fmap1"], -1, 1)
    if "grad_levels" in results:
        names = [f"grad_level{number}" for number in range(lookup.levels)]
        found["grad_levels"] = [np.moveaxis(found.pop(name), -1, 1) for name in names]
    return found


def pyramid_grads(device, grad_levels, lookup, dtype="float32", **how):
    """Return the gradient of a map in float64."""
    maps, channels, *size = grad_levels[0].shape
    cells = tuple(grad.shape[2:] for grad in grad_levels)
    problem = Problem(0, (maps, maps), channels, tuple(size), cells, ())
    mode = how.get("mode", "run")
    arrays = {"grad_fmap2": host._guarded(grad_levels[0].shape, dtype, True, mode)}
    for number, grad in enumerate(grad_levels):
        whole = arrays[f"grad_level{number}"] = host._guarded(
            _lying(grad, True).shape, dtype, True, mode
        )
        whole.array[...] = _lying(grad, True)
    plan = lookup_grads_plan.plan_pyramid_grads(problem, lookup, dtype, device)
    run_plan(plan, arrays, dtype, **how)
    host.check_arrays(arrays, {})
    return arrays["grad_fmap2"].array.astype(np.float64)


def _lying(fmap, last):
    return np.moveaxis(fmap, 1, -1) if last else fmap
