"""What surrounds products and differences on the CPU: windows' sums, and number formats.

A uint16 array holds the bits of bfloat16 numbers; sums are formed in the *accumulator's* dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cupycorr.cpu.threads import Scratch
from cupycorr.lattice import Lattice

Array = npt.NDArray[Any]


def sum_taps(volume: Array, y: Lattice, x: Lattice) -> Array:
    """Sum over the taps of each window: (..., lattice rows, columns) to (..., OH, OW)."""
    rows = [volume[..., tap, :] for tap in y.taps]
    volume = _sum(rows)
    return _sum([volume[..., tap] for tap in x.taps])


def _sum(parts: list[Array]) -> Array:
    if len(parts) == 1:
        return parts[0]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


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


def accumulator(array: Array) -> np.dtype[Any]:
    """Return the dtype in which sums of an array's values are formed."""
    return array.dtype if array.dtype == np.float64 else np.dtype(np.float32)


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
