"""Copies between feature maps and the tiles that products are made of.

Targets are packed as they are, sources with their columns in reverse (see `bands`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from cupycorr.cpu.plan import COPY_ELEMENTS, Block, Group, Step, spans
from cupycorr.cpu.taps import widen
from cupycorr.cpu.threads import Scratch, Unit

Array = npt.NDArray[Any]


def packed(
    fmap: Array,
    which: int,
    group: Group,
    step: Step,
    dtype: np.dtype[Any],
    arena: Scratch,
    names: Iterator[int],
    *,
    by_rows: bool = False,
) -> tuple[list[Array], list[Unit]]:
    """Return what blocks need of map 1 or 2, (N, tile, C, rows, columns) each, and how to pack it.

    ``names`` are those of the arrays in the arena. In memory the channels of a row lie together if
    ``by_rows``, or else the rows of a channel.
    """
    is_target = (which == 2) == group.blocks[0].mirrored
    values = fmap[:, :, group.images[which - 1]]
    mirrored_source = group.blocks[0].mirrored and not is_target
    hide = step if mirrored_source and step.hides else None
    if group.dense[which - 1] and fmap.dtype == dtype and hide is None:
        # Shifts work on the map itself, where its cache lines are worth reading again.
        sides = [(block.images[which - 1], block.across) for block in group.blocks]
        views = [
            values[..., columns][:, None, ..., across.targets if is_target else across.sources]
            for columns, across in sides
        ]
        return [view if is_target else view[..., ::-1] for view in views], []
    arrays = []
    for block in group.blocks:
        rows, columns = block.target_shape if is_target else block.source_shape
        shape = [len(fmap), block.across.repeat, fmap.shape[1], rows, columns]
        if by_rows:
            shape[2:4] = rows, fmap.shape[1]
        array = arena.take(next(names), tuple(shape), dtype)
        arrays.append(array.swapaxes(2, 3) if by_rows else array)
    units: list[Unit] = []
    for n, part in map_parts(values.shape):
        units.append(partial(_pack, values, which, group, hide, arrays, n, part))
    return arrays, units


def _pack(
    values: Array,
    which: int,
    group: Group,
    hide: Step | None,
    arrays: list[Array],
    n: slice,
    part: slice,
    scratch: Scratch,
) -> None:
    # In two steps: the map is read once, in order, and then from the cache.
    rows = scratch.take("rows", values[n, part].shape, arrays[0].dtype)
    widen(rows, values[n, part])
    per_n, per_channel, per_row, item = rows.strides
    for block, array in zip(group.blocks, arrays, strict=True):
        if array.size == 0:
            continue
        across, columns = block.across, block.images[which - 1]
        is_target = (which == 2) == block.mirrored
        first = columns.start + (across.start if is_target else across.source) * columns.step
        step = columns.step * item
        tiles = np.ndarray(
            (len(rows), across.repeat, *rows.shape[1:3], array.shape[4]),
            rows.dtype,
            rows,
            first * item,
            (per_n, across.size * step, per_channel, per_row, step),
        )
        target = array[n, :, part] if is_target else array[n, :, part, :, ::-1]
        target[...] = tiles
        if hide is not None:
            clear_untouched(target, group, block, hide)


def clear_untouched(array: Array, group: Group, block: Block, step: Step) -> None:
    """Zero the positions of map 1 that no tap touches: a zero gradient times NaN is no term.

    The array is (..., tile, C, rows, columns), columns not in reverse.
    """
    hidden_rows, hidden_columns = step.untouched
    if hidden_rows:
        array[..., np.isin(_indices(group.phase.lattice), hidden_rows), :] = 0
    if hidden_columns:
        hidden = np.isin(_indices(block.phase.lattice), hidden_columns)
        across = block.across
        for number in range(across.repeat):
            first = (across.source if block.mirrored else across.start) + number * across.size
            array[..., number, :, :, hidden[first : first + array.shape[-1]]] = 0


def _indices(span: slice) -> npt.NDArray[np.intp]:
    return np.arange(span.start, span.stop, span.step)


@lru_cache(maxsize=1024)
def map_parts(shape: tuple[int, ...]) -> tuple[tuple[slice, slice], ...]:
    """Split a map into (samples, channels) small enough to stay in the cache between copies."""
    batch, channels, rows, columns = shape
    planes = max(1, COPY_ELEMENTS // max(1, rows * columns))
    return tuple(product(spans(batch, max(1, planes // channels)), spans(channels, planes)))


@lru_cache(maxsize=1024)
def volume_parts(shape: tuple[int, ...]) -> tuple[tuple[slice, slice, slice], ...]:
    """Split (N, P, Q, rows, columns) into (samples, displacements p, displacements q)."""
    batch, patch_y, patch_x, rows, columns = shape
    planes = max(1, COPY_ELEMENTS // (rows * columns))
    return tuple(
        product(
            spans(batch, max(1, planes // (patch_y * patch_x))),
            spans(patch_y, max(1, planes // patch_x)),
            spans(patch_x, planes),
        )
    )
