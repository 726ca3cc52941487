"""The cost volume and its gradients as literal loops over the definition.

Reads the seven raw fields of a geometry and computes every index anew, so that an error in
``Geometry`` cannot hide in it. Slow; float64 arrays in, float64 arrays out.
"""

from itertools import product

import numpy as np

from cupycorr.verify import Engine


def terms(shape, geometry):
    """Yield (p, q, y, x, Y1, X1, Y2, X2) of every term whose two positions lie in the image."""
    _, _, height, width = shape
    (kh, kw), (ph, pw) = geometry.kernel_size, geometry.patch_size
    (sy, sx), (py, px) = geometry.stride, geometry.padding
    (dy, dx), (ey, ex) = geometry.dilation, geometry.dilation_patch
    fy, fx = geometry.first_displacement
    *_, oh, ow = cost_shape(shape, geometry)
    for p, q, y, x, i, j in product(*map(range, (ph, pw, oh, ow, kh, kw))):
        y1, x1 = y * sy - py + i * dy, x * sx - px + j * dx
        y2, x2 = y1 + fy + p * ey, x1 + fx + q * ex
        if all((0 <= y1 < height, 0 <= x1 < width, 0 <= y2 < height, 0 <= x2 < width)):
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


def engine():
    """Return the loops as an engine of `verify`; they run once for each set of arguments."""

    def forward(fmap1, fmap2, geometry, dtype, normalize):
        cost = _once(correlation, geometry, fmap1, fmap2)
        return cost / (_terms_of_a_window(fmap1, geometry) if normalize else 1)

    def vjp(grad, fmap1, fmap2, geometry, dtype, normalize):
        grads = _once(correlation_vjp, geometry, grad, fmap1, fmap2)
        divisor = _terms_of_a_window(fmap1, geometry) if normalize else 1
        return tuple(g / divisor for g in grads)

    return Engine("loops", forward, vjp)


def _terms_of_a_window(fmap, geometry):
    return max(1, fmap.shape[1]) * geometry.kernel_size[0] * geometry.kernel_size[1]


_results = {}


def _once(function, geometry, *arrays):
    key = (function, geometry, *((array.shape, array.tobytes()) for array in arrays))
    if key not in _results:
        _results[key] = function(*arrays, geometry)
    return _results[key]
