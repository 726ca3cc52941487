"""Levels of maps and of volumes, each pooled from the one before, and the adjoint, on the CPU.

The levels of maps come with their channels last, (F, h, w, C); volumes are (M, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise, product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from cupycorr.cpu.plan import spans
from cupycorr.cpu.taps import accumulator, store, widen
from cupycorr.cpu.threads import Scratch, Team
from cupycorr.geometry import Pair

Array = npt.NDArray[Any]

ELEMENTS = 1 << 16
"""Elements that a unit of copying or pooling takes at least, if there are so many."""


def pyramid(levels: Sequence[Array], pool: Pair, *, threads: int | None = None) -> None:
    """Pool each level into the next.

    Parameters
    ----------
    levels : sequence of array (N, h, w, ...), float16|float32|float64, uint16 for bfloat16
        The first is given, the others are written: each cell is the mean of ``pool`` cells, summed
        row by row in the accumulator's dtype, and rounded.
    pool : (int, int)
        Cells that are averaged to one.
    threads : int, optional
        Threads to use at most; by default as many as NumPy's BLAS.
    """
    with Team(levels[0].size * 4, threads) as team:
        for fine, coarse in pairwise(levels):
            parts = product(
                spans(len(coarse), max(1, ELEMENTS // max(1, coarse[:1].size))),
                spans(coarse.shape[1], max(1, ELEMENTS // max(1, coarse[:1, :1].size))),
            )
            team.work([partial(_pool, fine, coarse, pool, *part) for part in parts])


def _pool(
    fine: Array, coarse: Array, pool: Pair, entries: slice, rows: slice, scratch: Scratch
) -> None:
    out, cells = coarse[entries, rows], fine[entries, rows.start * pool[0] :]
    sums = scratch.take("sums", out.shape, accumulator(coarse.dtype))
    wide = scratch.take("wide", out.shape, sums.dtype)
    sums.fill(0)
    for i, j in product(*map(range, pool)):
        part = cells[:, i :: pool[0], j :: pool[1]][:, : out.shape[1], : out.shape[2]]
        if part.dtype == sums.dtype:
            sums += part
        else:
            widen(wide, part)
            sums += wide
    store(out, sums, prod(pool))


def pyramid_grads(grads: Sequence[Array], result: Array, pool: Pair) -> None:
    """Add up the gradients of all levels: the adjoint of `pyramid`.

    Parameters
    ----------
    grads : sequence of array (N, h, w, ...), one dtype
        The gradient of each level.
    result : array (N, H, W, ...)
        The gradient of the first, through all of them, which is written.
    pool : (int, int)
        Cells that were averaged to one.
    """
    dtype = accumulator(result.dtype)
    coarse: Array | None = None
    for grad in reversed(grads):
        total = np.empty(grad.shape, dtype)
        widen(total, grad)
        if coarse is not None:
            coarse /= dtype.type(prod(pool))
            rows, columns = (count * n for count, n in zip(coarse.shape[1:3], pool, strict=True))
            for i, j in product(*map(range, pool)):
                total[:, i : rows : pool[0], j : columns : pool[1]] += coarse
        coarse = total
    store(result, total, 1)
