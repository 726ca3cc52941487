"""Run the CUDA kernels of the flow-guided lookup on the processor, as `host` runs the others."""

import host
import numpy as np

from cupycorr.cuda import lookup_plan
from cupycorr.layer import DTYPES


def cost(
    device,
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
    planned=None,
    **how,
):
    """Return the cost in float64, of maps in float64 whose values a dtype has.

    ``last`` says whether maps lie in memory with their channels last, ``aligned`` whether arrays
    begin at multiples of 16 bytes, ``planned`` turns a plan into the one that is run, and ``how``
    goes to `run_plan`.
    """
    mode = how.get("mode", "run")
    index = [value for value in (index1, index2) if value is not None]
    problem = lookup_plan.Problem(
        len(coords),
        (len(fmap1), len(levels[0])),
        fmap1.shape[1],
        fmap1.shape[2:],
        tuple(level.shape[2:] for level in levels),
        (last,) * (1 + len(levels)),
        str(index[0].dtype) if index else "int64",
    )
    arrays = {}
    for name, fmap in (("fmap1", fmap1), *((f"level{n}", one) for n, one in enumerate(levels))):
        arrays[name] = _filled(np.moveaxis(fmap, 1, -1) if last else fmap, dtype, aligned, mode)
    arrays["coords"] = _filled(coords, DTYPES[dtype].accumulator, aligned, mode)
    for name, value in (("index1", index1), ("index2", index2)):
        if value is not None:
            arrays[name] = _filled(value, problem.index_dtype, aligned, mode)
    given = {name: whole.array.copy() for name, whole in arrays.items()}
    arrays["cost"] = host._guarded(
        lookup.cost_shape(fmap1.shape, coords.shape), dtype, aligned, mode
    )
    plan = lookup_plan.plan_cost(problem, lookup, dtype, device, aligned=aligned, plain=plain)
    plan = plan if planned is None else planned(plan)
    run_plan(plan, arrays, dtype, scale, **how)
    host.check_arrays(arrays, given)
    return arrays["cost"].array.astype(np.float64)


def pyramid(device, fmap2, lookup, dtype="float32", *, last=False, **how):
    """Return the levels of a map in float64, as the kernels compute them."""
    cells = lookup.level_sizes(*fmap2.shape[2:])
    problem = lookup_plan.Problem(
        0, (len(fmap2),) * 2, fmap2.shape[1], fmap2.shape[2:], tuple(cells), (last,)
    )
    mode = how.get("mode", "run")
    arrays = {"fmap2": _filled(np.moveaxis(fmap2, 1, -1) if last else fmap2, dtype, True, mode)}
    for level, size in enumerate(cells):
        shape = (len(fmap2), *size, fmap2.shape[1])
        arrays[f"level{level}"] = host._guarded(shape, dtype, True, mode)
    if last:
        arrays["level0"] = arrays["fmap2"]
    plan = lookup_plan.plan_pyramid(problem, lookup, dtype, copied=not last)
    run_plan(plan, arrays, dtype, **how)
    host.check_arrays(arrays, {})
    return [
        np.moveaxis(arrays[f"level{level}"].array.astype(np.float64), -1, 1)
        for level in range(lookup.levels)
    ]


def run_plan(plan, arrays, dtype, scale=1.0, **how):
    """Run a plan's launches on guarded arrays by name; those that are not there are None."""
    given = dict.fromkeys(name for launch in plan.launches for name in launch.arrays)
    given |= {name: whole.array for name, whole in arrays.items()}
    host.run_plan(plan, given, dtype, scale, **how)


def _filled(values, dtype, aligned, mode):
    whole = host._guarded(values.shape, dtype, aligned, mode)
    whole.array[...] = values
    return whole
