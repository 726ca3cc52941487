"""Sums over the taps, and number formats, on the CPU.

A uint16 array holds the bits of bfloat16 numbers; sums are formed in the *accumulator's* dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cupycorr.cpu.threads import Scratch
from cupycorr.lattice import Lattice
from cupycorr.layer import DTYPES

Array = npt.NDArray[Any]


def sum_taps(volume: Array, y: Lattice, x: Lattice) -> Array:
    """Sum over the taps: (..., lattice rows, columns) to (..., OH, OW)."""
    for taps, columns in ((y.taps, (slice(None),)), (x.taps, ())):
        total = volume[(..., taps[0], *columns)]
        if len(taps) > 1:
            total = total + volume[(..., taps[1], *columns)]
        for tap in taps[2:]:
            total += volume[(..., tap, *columns)]
        volume = total
    return volume


def spread_taps(
    volume: Array, grad: Array, y: Lattice, x: Lattice, scratch: Scratch | None = None
) -> None:
    """Adjoint of `sum_taps`: write the volume's gradient from the cost's."""
    if len(y.taps) == len(x.taps) == 1:
        widen(volume, grad)
        return
    wide = np.empty(grad.shape, volume.dtype)
    widen(wide, grad)
    rows = np.zeros((*wide.shape[:-1], x.size), volume.dtype)
    for tap in x.taps:
        rows[..., tap] += wide
    volume.fill(0)
    for tap in y.taps:
        volume[..., tap, :] += rows


# Number formats.


def accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which sums of stored values are formed."""
    return ACCUMULATORS[dtype]


# bfloat16 is stored as its bits.
ACCUMULATORS = {
    np.dtype("uint16" if name == "bfloat16" else name): np.dtype(kind.accumulator)
    for name, kind in DTYPES.items()
}


def widen(out: Array, values: Array) -> None:
    """Copy to the accumulator's dtype."""
    if values.dtype == np.uint16:
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, values)


def store(out: Array, sums: Array, divisor: int, scratch: Scratch | None = None) -> None:
    """Divide, and round once to the storage dtype, to nearest even."""
    if out.dtype == np.uint16:
        if divisor != 1:
            sums = sums / sums.dtype.type(divisor)
        bits = np.ascontiguousarray(sums).view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        out[...] = np.where(np.isnan(sums), 0x7FC0, rounded)
    elif divisor != 1:
        np.divide(sums, sums.dtype.type(divisor), out=out, casting="same_kind")
    else:
        np.copyto(out, sums, casting="same_kind")
