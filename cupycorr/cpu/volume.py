"""Samples of an explicit cost volume around coordinates, and their gradients, on the CPU.

Every position has a map of its own, of which it reads the taps of its displacements. The engine
trusts its arguments. A uint16 array holds the bits of bfloat16 numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from cupycorr.cpu.places import Places, by_rows, is_finite
from cupycorr.cpu.plan import spans
from cupycorr.cpu.taps import accumulator, store, widen
from cupycorr.cpu.threads import Scratch, Team, Unit
from cupycorr.geometry import Pair
from cupycorr.lookup import Lookup

Array = npt.NDArray[Any]

CHUNK = 1 << 10
"""Positions of a unit of work: what they read of a level stays in the cache."""


def run(
    what: str, arrays: Mapping[str, Any], lookup: Lookup, *, threads: int | None = None
) -> None:
    """Compute samples of a volume, or their gradients, into arrays.

    Parameters
    ----------
    what : {"cost", "grads"}
        The samples; or the gradients, for an upstream gradient.
    arrays : mapping of name to array
        Inputs "levels", a sequence of arrays (N, *P, h, w), "coords" (N, 2, *P), and for "grads"
        "grad_cost" (N, levels, PH, PW, *P), or (N, levels, PW, PH, *P) in the order "xy". Results,
        which are written: "cost", alike, or those of "grad_levels", contiguous, and "grad_coords"
        that are there and not None. Volumes, costs and their gradients have one dtype,
        float16|float32|float64, or uint16 for bfloat16; the others that of coords, float32, or
        float64 with float64 volumes.
    lookup : Lookup
        What is sampled.
    threads : int, optional
        Threads to use at most; by default as many as NumPy's BLAS.
    """
    coords = arrays["coords"].reshape(*arrays["coords"].shape[:2], -1)
    count = coords.shape[2]
    sizes = [level.shape[-2:] for level in arrays["levels"]]
    levels = [level.reshape(len(coords), count, -1) for level in arrays["levels"]]
    results = {
        name: by_rows(array, lookup)
        for name in ("cost", "grad_cost")
        if (array := arrays.get(name)) is not None
    }
    grad_coords = arrays.get("grad_coords")
    if grad_coords is not None:
        results["grad_coords"] = grad_coords.reshape(coords.shape)
    grad_levels = [grad.reshape(len(coords), count, -1) for grad in arrays.get("grad_levels") or ()]
    parts = [(n, part) for n in range(len(coords)) for part in spans(count, CHUNK)]
    units: list[Unit] = []
    for n, part in parts:
        of_part = {name: array[n, ..., part] for name, array in results.items()}
        values = [level[n, part] for level in levels]
        grads = [grad[n, part] for grad in grad_levels]
        work = _sample if what == "cost" else _differentiate
        units.append(partial(work, coords[n, :, part], values, sizes, lookup, of_part, grads))
    with Team(coords.size * lookup.levels * prod(lookup.patch_size), threads) as team:
        team.work(units)


def _sample(
    coords: Array,
    levels: list[Array],
    sizes: list[Pair],
    lookup: Lookup,
    results: dict[str, Array],
    _: list[Array],
    scratch: Scratch,
) -> None:
    for number, (level, size) in enumerate(zip(levels, sizes, strict=True)):
        places = Places(coords, number, size, lookup, one_row=True)
        out = results["cost"][number]
        wide = out
        if out.dtype != coords.dtype:
            wide = scratch.take("cost", out.shape, coords.dtype)
        places.interpolate(_values(places, level, scratch), 1, wide, scratch)
        if wide is not out:
            store(out, wide, 1)


def _differentiate(
    coords: Array,
    levels: list[Array],
    sizes: list[Pair],
    lookup: Lookup,
    results: dict[str, Array],
    grad_levels: list[Array],
    scratch: Scratch,
) -> None:
    grad_coords = results.get("grad_coords")
    sums = np.zeros(coords.shape, coords.dtype)
    for number, (level, size) in enumerate(zip(levels, sizes, strict=True)):
        places = Places(coords, number, size, lookup, one_row=grad_coords is None)
        grad = scratch.take("grad", results["grad_cost"][number].shape, coords.dtype)
        widen(grad, results["grad_cost"][number])
        if grad_coords is not None:
            for axis, slope in enumerate(places.slopes(_values(places, level, scratch))):
                factor = coords.dtype.type(lookup.pool[1 - axis] ** number)
                sums[axis] += np.einsum("jip,jip->p", grad, slope) / factor
        if grad_levels:
            _scatter(places, grad, grad_levels[number], scratch)
    if grad_coords is not None:
        sums[:, np.isnan(coords).any(0)] = np.nan
        store(grad_coords, sums, 1)


def _values(places: Places, level: Array, scratch: Scratch) -> Array:
    """Return what the positions' maps (n, h * w) have at the taps, (rows, columns, n)."""
    taps = scratch.take("taps", places.shape, accumulator(level.dtype))
    first = places.flat()
    flat = level.reshape(-1)
    if flat.size == 0:
        taps.fill(0)
        return taps
    for tap, row, column in places.taps():
        at = first + (row * places.size[1] + column)
        if flat.dtype == taps.dtype:
            np.take(flat, at, out=taps[tap], mode="clip")
        else:
            widen(taps[tap], np.take(flat, at, mode="clip"))
    taps[~places.exist()] = 0
    return taps


def _scatter(places: Places, grad: Array, out: Array, scratch: Scratch) -> None:
    """Write the gradient of the positions' maps: no two taps of a position are one cell."""
    out.fill(0)
    flat, first = out.reshape(-1), places.flat()
    shares = places.shares(grad, 1, slice(None), scratch, careful=not is_finite(grad))
    for tap, at, y, x in places.terms(slice(None)):
        cells = first[at] + ((y - places.y[at]) * places.size[1] + x - places.x[at])
        values = np.empty(at.size, out.dtype)
        store(values, shares[tap][at], 1)
        flat[cells] = values
