"""The flow-guided lookup and its gradients as literal loops over the definition.

Maps are (A, C, *P) and levels (F, C, h, w), coords (E, 2, *P) with (x, y) in this order. Where a
position looks is computed in the dtype of coords, everything else in float64. Slow.
"""

import numpy as np


def pyramid(fmap2, lookup):
    """Return the levels of a map in float64, without any rounding."""
    (py, px), levels = lookup.pool, [np.asarray(fmap2, np.float64)]
    for _ in range(1, lookup.levels):
        finer = levels[-1]
        h, w = finer.shape[2] // py, finer.shape[3] // px
        level = np.zeros((*finer.shape[:2], h, w))
        for v in range(h):
            for u in range(w):
                cells = finer[:, :, v * py : (v + 1) * py, u * px : (u + 1) * px]
                level[:, :, v, u] = cells.sum((2, 3)) / (py * px)
        levels.append(level)
    return levels


def pyramid_vjp(grads, lookup):
    """Return the gradient with respect to the map, from those of its levels."""
    (py, px), below = lookup.pool, np.zeros_like(grads[-1])
    for level, grad in reversed(list(enumerate(grads))):
        total = grad + below
        if level == 0:
            return total
        below = np.zeros_like(grads[level - 1])
        for v, u in np.ndindex(total.shape[2:]):
            share = total[:, :, v, u, None, None] / (py * px)
            below[:, :, v * py : (v + 1) * py, u * px : (u + 1) * px] += share
    raise AssertionError("a lookup has a level")


def cost(fmap1, levels, coords, lookup, scale, index1=None, index2=None):
    """Return the cost (E, L, PH, PW, *P), or (E, L, PW, PH, *P) in the order "xy"."""
    result = np.zeros(lookup.cost_shape(fmap1.shape, coords.shape))
    for e, level, p, place, sums, *_ in _positions(fmap1, levels, coords, lookup, index1, index2):
        for at, (v, u), weight in _terms(place, lookup):
            if np.isnan(weight):
                result[(e, level, *at, *p)] = np.nan
            elif weight and _inside(sums, v, u):
                result[(e, level, *at, *p)] += weight * sums[v, u]
    return scale * result


def grads(grad, fmap1, levels, coords, lookup, scale, index1=None, index2=None):
    """Return the gradients with respect to fmap1, the levels (a list) and coords."""
    grad, fmap1 = grad.astype(np.float64), fmap1.astype(np.float64)
    levels = [level.astype(np.float64) for level in levels]
    grad_fmap1, grad_coords = np.zeros(fmap1.shape), np.zeros(coords.shape)
    grad_levels = [np.zeros(level.shape) for level in levels]
    positions = _positions(fmap1, levels, coords, lookup, index1, index2)
    for e, level, p, place, sums, one, two in positions:
        if np.isnan(coords[(e, slice(None), *p)]).any():
            grad_coords[(e, slice(None), *p)] = np.nan
            continue
        if one is None or two is None:
            continue
        upstream = {}
        for at, (v, u), weight in _terms(place, lookup):
            if weight and _inside(sums, v, u):
                term = scale * weight * grad[(e, level, *at, *p)]
                upstream[v, u] = upstream.get((v, u), 0.0) + term
        for (v, u), value in upstream.items():
            grad_fmap1[(one, slice(None), *p)] += value * levels[level][two, :, v, u]
            grad_levels[level][two, :, v, u] += value * fmap1[(one, slice(None), *p)]
        for axis in (0, 1):
            slope = 0.0
            for at, (v, u), weight in _terms(place, lookup, differentiated=axis):
                if weight and _inside(sums, v, u):
                    slope += grad[(e, level, *at, *p)] * weight * sums[v, u]
            grad_coords[(e, axis, *p)] += scale / lookup.pool[1 - axis] ** level * slope
    return grad_fmap1, grad_levels, grad_coords


def volume_cost(levels, coords, lookup):
    """Return the cost (N, L, PH, PW, *P) of levels (N, *P, h, w), in the order of `cost`.

    It is a lookup in maps of one channel, one for each position, whose fmap1 is 1.
    """
    return _together(cost(*_apart(levels, coords), lookup, 1.0), coords)


def volume_grads(grad, levels, coords, lookup):
    """Return the gradients of `volume_cost` with respect to the levels (a list) and coords."""
    positions = coords.ndim - 2
    last = np.moveaxis(grad, range(-positions, 0), range(1, positions + 1))
    upstream = last.reshape(-1, *grad.shape[1:-positions], 1)
    _, grad_levels, grad_coords = grads(upstream, *_apart(levels, coords), lookup, 1.0)
    pairs = zip(grad_levels, levels, strict=True)
    return [one.reshape(level.shape) for one, level in pairs], _together(grad_coords, coords)


def _apart(levels, coords):
    """Return fmap1, levels and coords of a lookup that has a sample for each position."""
    maps = [level.reshape(-1, 1, *level.shape[-2:]) for level in levels]
    return np.ones((len(maps[0]), 1, 1)), maps, np.moveaxis(coords, 1, -1).reshape(-1, 2, 1)


def _together(array, coords):
    """Return an array (N * P, ..., 1) of every position as (N, ..., *P)."""
    samples, inner = len(coords), array.shape[1:-1]
    positions = np.moveaxis(array.reshape(samples, -1, *inner), 1, -1)
    return positions.reshape(samples, *inner, *coords.shape[2:])


def _positions(fmap1, levels, coords, lookup, index1, index2):
    """Yield (e, level, p, place, sums over channels of a level, first map, second map).

    ``place`` is ((Y0, b), (X0, a)); a map that does not exist is None, and the sums are zeros.
    """
    for e, level in np.ndindex(len(coords), lookup.levels):
        size = levels[level].shape[2:]
        one = _map(index1, e, len(fmap1))
        two = _map(index2, e, len(levels[level]))
        for p in np.ndindex(fmap1.shape[2:]):
            place = tuple(
                _place(coords[(e, axis, *p)], pool**level, cells, reach)
                for axis, pool, cells, reach in zip(
                    (1, 0), lookup.pool, size, lookup.reach, strict=True
                )
            )
            sums = np.zeros(size)
            if one is not None and two is not None:
                own = fmap1[(one, slice(None), *p)].astype(np.float64)
                sums = np.einsum("c,cvu->vu", own, levels[level][two].astype(np.float64))
            yield e, level, p, place, sums, one, two


def _map(index, e, count):
    which = e if index is None else int(index[e])
    return which if 0 <= which < count else None


def _place(coordinate, pool, size, reach):
    """Return the floor of a scaled coordinate, and what it lies beyond."""
    scaled = coordinate / coordinate.dtype.type(pool)
    if np.isnan(scaled):
        return 0, np.nan
    if abs(scaled) > 2 * (size + reach + 2):
        return -reach - 2, 0.0
    below = np.floor(scaled)
    return int(below), float(scaled - below)


def _terms(place, lookup, differentiated=None):
    """Yield (output's indices, (v, u), weight) of all corners of all displacements.

    With ``differentiated`` weights are derivatives by x (0) or y (1), from the right at integers.
    """
    (y, b), (x, a) = place
    rows, columns = lookup.displacements
    weights_y = (-1.0, 1.0) if differentiated == 1 else (1 - b, b)
    weights_x = (-1.0, 1.0) if differentiated == 0 else (1 - a, a)
    for j, dy in enumerate(rows):
        for i, dx in enumerate(columns):
            at = (i, j) if lookup.x_first else (j, i)
            for d in (0, 1):
                for k in (0, 1):
                    yield at, (y + dy + d, x + dx + k), weights_y[d] * weights_x[k]


def _inside(array, v, u):
    return 0 <= v < array.shape[0] and 0 <= u < array.shape[1]
