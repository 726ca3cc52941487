"""The cost volumes and their gradients as literal loops over the definition.

Reads the seven raw fields of a geometry and computes every index anew, so that an error in
``Geometry`` cannot hide in it. Slow; float64 arrays in, float64 arrays out.
"""

from itertools import product

import numpy as np

from cupycorr.verify import Engine


def terms(shape, geometry):
    """Yield (p, q, y, x, Y1, X1, Y2, X2) of every term whose two positions lie in the image."""
    for *at, y1, x1, y2, x2 in positions(shape, geometry):
        if inside(shape, y1, x1) and inside(shape, y2, x2):
            yield *at, y1, x1, y2, x2


def inside(shape, y, x):
    return 0 <= y < shape[2] and 0 <= x < shape[3]


def positions(shape, geometry):
    """Yield (p, q, y, x, Y1, X1, Y2, X2) of every tap of every output and displacement."""
    (kh, kw), (ph, pw) = geometry.kernel_size, geometry.patch_size
    (sy, sx), (py, px) = geometry.stride, geometry.padding
    (dy, dx), (ey, ex) = geometry.dilation, geometry.dilation_patch
    fy, fx = geometry.first_displacement
    *_, oh, ow = cost_shape(shape, geometry)
    for p, q, y, x, i, j in product(*map(range, (ph, pw, oh, ow, kh, kw))):
        y1, x1 = y * sy - py + i * dy, x * sx - px + j * dx
        y2, x2 = y1 + fy + p * ey, x1 + fx + q * ex
        yield p, q, y, x, y1, x1, y2, x2


def cost_shape(shape, geometry):
    """Return (N, PH, PW, OH, OW)."""
    _, _, height, width = shape
    (kh, kw), (sy, sx) = geometry.kernel_size, geometry.stride
    (py, px), (dy, dx) = geometry.padding, geometry.dilation
    oh = (height + 2 * py - dy * (kh - 1) - 1) // sy + 1
    ow = (width + 2 * px - dx * (kw - 1) - 1) // sx + 1
    return (shape[0], *geometry.patch_size, oh, ow)


def correlation(fmap1, fmap2, geometry):
    """Return the cost volume (N, PH, PW, OH, OW)."""
    cost = np.zeros(cost_shape(fmap1.shape, geometry))
    for p, q, y, x, y1, x1, y2, x2 in terms(fmap1.shape, geometry):
        cost[:, p, q, y, x] += (fmap1[:, :, y1, x1] * fmap2[:, :, y2, x2]).sum(1)
    return cost


def correlation_vjp(grad_cost, fmap1, fmap2, geometry):
    """Return the gradients with respect to fmap1 and fmap2."""
    grad_fmap1, grad_fmap2 = np.zeros(fmap1.shape), np.zeros(fmap2.shape)
    for p, q, y, x, y1, x1, y2, x2 in terms(fmap1.shape, geometry):
        upstream = grad_cost[:, p, q, y, x, None]
        grad_fmap1[:, :, y1, x1] += upstream * fmap2[:, :, y2, x2]
        grad_fmap2[:, :, y2, x2] += upstream * fmap1[:, :, y1, x1]
    return grad_fmap1, grad_fmap2


def differences(fmap1, fmap2, geometry):
    """Return the cost volume of absolute differences, with zeros outside the image."""
    cost = np.zeros(cost_shape(fmap1.shape, geometry))
    for p, q, y, x, one, two in _values(fmap1, fmap2, geometry):
        cost[:, p, q, y, x] += abs(one - two).sum(1)
    return cost


def differences_tangent(fmap1, fmap2, tangent1, tangent2, geometry):
    """Return the change of that cost volume when the maps change by the tangents."""
    cost = np.zeros(cost_shape(fmap1.shape, geometry))
    changes = _values(tangent1, tangent2, geometry)
    for (p, q, y, x, one, two), (*_, up, down) in zip(
        _values(fmap1, fmap2, geometry), changes, strict=True
    ):
        cost[:, p, q, y, x] += (_sign(one, two) * (up - down)).sum(1)
    return cost


def differences_vjp(grad_cost, fmap1, fmap2, geometry):
    """Return its subgradients with respect to fmap1 and fmap2."""
    grad_fmap1, grad_fmap2 = np.zeros(fmap1.shape), np.zeros(fmap2.shape)
    all_positions = positions(fmap1.shape, geometry)
    for (*_, y1, x1, y2, x2), (p, q, y, x, one, two) in zip(
        all_positions, _values(fmap1, fmap2, geometry), strict=True
    ):
        term = grad_cost[:, p, q, y, x, None] * _sign(one, two)
        if inside(fmap1.shape, y1, x1):
            grad_fmap1[:, :, y1, x1] += term
        if inside(fmap1.shape, y2, x2):
            grad_fmap2[:, :, y2, x2] -= term
    return grad_fmap1, grad_fmap2


def _values(fmap1, fmap2, geometry):
    """Yield (p, q, y, x) and both maps' values (N, C) of every tap, zeros outside the image."""
    zeros = np.zeros(fmap1.shape[:2])
    for *at, y1, x1, y2, x2 in positions(fmap1.shape, geometry):
        one = fmap1[:, :, y1, x1] if inside(fmap1.shape, y1, x1) else zeros
        two = fmap2[:, :, y2, x2] if inside(fmap2.shape, y2, x2) else zeros
        yield *at, one, two


def _sign(one, two):
    return 1.0 * (one > two) - (one < two)


def engine():
    """Return the loops as an engine of `verify`; they run once for each set of arguments."""

    def cost(fmap1, fmap2, layer, dtype):
        function = {"product": correlation, "l1": differences}[layer.similarity]
        return _once(function, layer.geometry, fmap1, fmap2) / _divisor(fmap1, layer)

    def grads(grad, fmap1, fmap2, layer, dtype):
        function = {"product": correlation_vjp, "l1": differences_vjp}[layer.similarity]
        grads = _once(function, layer.geometry, grad, fmap1, fmap2)
        return tuple(g / _divisor(fmap1, layer) for g in grads)

    return Engine("loops", cost, grads)


def _divisor(fmap, layer):
    kernel_y, kernel_x = layer.geometry.kernel_size
    return max(1, fmap.shape[1]) * kernel_y * kernel_x if layer.normalize else 1


_results = {}


def _once(function, geometry, *arrays):
    key = (function, geometry, *((array.shape, array.tobytes()) for array in arrays))
    if key not in _results:
        _results[key] = function(*arrays, geometry)
    return _results[key]
