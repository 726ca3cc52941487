"""Run the CUDA kernels of the volume lookup on the processor, as `host` runs the others."""

import host
import numpy as np

from cupycorr.cuda import volume_lookup_plan
from cupycorr.layer import DTYPES


def cost(levels, coords, lookup, dtype="float32", **how):
    """Return the cost in float64, of levels and coords in float64; ``how`` as for `_compute`."""
    positions = coords.shape[2:]
    results = {"cost": (lookup.cost_shape((0, 1, *positions), coords.shape), dtype)}

    def plan(problem):
        return volume_lookup_plan.plan_cost(problem, lookup, dtype)

    return _compute(plan, {}, levels, coords, results, dtype, **how)["cost"]


def grads(
    grad, levels, coords, lookup, dtype="float32", *, results=volume_lookup_plan.GRADIENTS, **how
):
    """Return gradients in float64 by name, "grad_levels" as a list; ``how`` as for `_compute`."""
    written = {}
    if "grad_levels" in results:
        written |= {f"grad_level{n}": (level.shape, dtype) for n, level in enumerate(levels)}
    if "grad_coords" in results:
        written["grad_coords"] = coords.shape, DTYPES[dtype].accumulator

    def plan(problem):
        return volume_lookup_plan.plan_grads(results, problem, lookup, dtype)

    found = _compute(plan, {"grad_cost": grad}, levels, coords, written, dtype, **how)
    if "grad_levels" in results:
        found["grad_levels"] = [found.pop(f"grad_level{n}") for n in range(lookup.levels)]
    return found


def _compute(
    plan, inputs, levels, coords, results, dtype,
    *, aligned=True, order="ascending", mode="run", patch=None, planned=None, log=None,
):  # fmt: skip
    """Run a launch, on guarded arrays by name.

    ``aligned`` says whether arrays begin at multiples of 16 bytes, ``planned`` turns a launch into
    the one that is run, and ``log``, a list, is given the record of all accesses.
    """
    cells = tuple(level.shape[-2:] for level in levels)
    given = inputs | {f"level{n}": level for n, level in enumerate(levels)} | {"coords": coords}
    arrays = {}
    for name, value in given.items():
        kind = DTYPES[dtype].accumulator if name == "coords" else dtype
        arrays[name] = host._guarded(value.shape, kind, aligned, mode)
        arrays[name].array[...] = value
    kept = {name: whole.array.copy() for name, whole in arrays.items()}
    for name, (shape, kind) in results.items():
        arrays[name] = host._guarded(shape, kind, aligned, mode)
    operands = {name: whole.array for name, whole in arrays.items()}
    operands["levels"] = [operands[f"level{n}"] for n in range(len(levels))]
    # Gradients that are not computed are not written: those of the levels may be the levels.
    operands["grad_levels"] = [
        operands.get(f"grad_level{n}", level) for n, level in enumerate(operands["levels"])
    ]
    operands.setdefault("grad_coords", None)
    launch = plan(volume_lookup_plan.problem_of(coords.shape, cells))
    launch = launch if planned is None else planned(launch)
    wide = np.dtype(DTYPES[dtype].accumulator).type
    how = {"order": order} | ({} if log is None else {"log": "arrays"})
    accesses = host.run(host.build(launch, mode, patch), launch, operands, wide(1), **how)
    if log is not None:
        log.append(accesses)
    host.check_arrays(arrays, kept)
    return {name: arrays[name].array.astype(np.float64) for name in results}
