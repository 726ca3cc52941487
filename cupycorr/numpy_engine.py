"""The cost volume and its gradients on the CPU, one displacement at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cupycorr.geometry import Geometry

Array = npt.NDArray[Any]


def forward(fmap1: Array, fmap2: Array, cost: Array, geometry: Geometry, *, divisor: int = 1, threads: int | None = None) -> None:
    one, two = _widen(fmap1), _widen(fmap2)
    full = np.zeros(cost.shape, one.dtype)
    for place, rows1, columns1, rows2, columns2 in _terms(fmap1.shape, geometry):
        full[(slice(None), *place)] += (one[:, :, rows1, columns1] * two[:, :, rows2, columns2]).sum(1)
    _narrow(full / full.dtype.type(divisor), cost)


def backward(grad_cost: Array, fmap1: Array, fmap2: Array, grad_fmap1: Array | None, grad_fmap2: Array | None, geometry: Geometry, *, divisor: int = 1, threads: int | None = None) -> None:
    grad, one, two = _widen(grad_cost), _widen(fmap1), _widen(fmap2)
    full1, full2 = np.zeros_like(one), np.zeros_like(two)
    for place, rows1, columns1, rows2, columns2 in _terms(fmap1.shape, geometry):
        upstream = grad[(slice(None), *place)][:, None]
        if grad_fmap1 is not None:
            full1[:, :, rows1, columns1] += upstream * two[:, :, rows2, columns2]
        if grad_fmap2 is not None:
            full2[:, :, rows2, columns2] += upstream * one[:, :, rows1, columns1]
    if grad_fmap1 is not None:
        _narrow(full1 / full1.dtype.type(divisor), grad_fmap1)
    if grad_fmap2 is not None:
        _narrow(full2 / full2.dtype.type(divisor), grad_fmap2)


def _terms(shape, g):
    _, _, h, w = shape
    oh, ow = g.output_size(h, w)
    def axis(a, n, o, u, p):
        s1 = u * a.dilation - a.padding
        d = a.first_displacement + p * a.dilation_patch
        lo = max(0, -(s1 // a.stride), -((s1 + d) // a.stride))
        hi = min(o, (n - 1 - s1) // a.stride + 1, (n - 1 - s1 - d) // a.stride + 1)
        if hi <= lo:
            return None
        s = lambda z: slice(s1 + z + lo * a.stride, s1 + z + (hi - 1) * a.stride + 1, a.stride)
        return slice(lo, hi), s(0), s(d)
    for u in range(g.kernel_size[0]):
        for v in range(g.kernel_size[1]):
            for p in range(g.patch_size[0]):
                for q in range(g.patch_size[1]):
                    y, x = axis(g.y, h, oh, u, p), axis(g.x, w, ow, v, q)
                    if y and x:
                        yield (p, q, y[0], x[0]), y[1], x[1], y[2], x[2]


def _widen(a: Array) -> Array:
    if a.dtype == np.uint16:
        return (a.astype(np.uint32) << 16).view(np.float32)
    return a.astype(np.float32) if a.dtype == np.float16 else a


def _narrow(a: Array, out: Array) -> None:
    if out.dtype == np.uint16:
        u = np.ascontiguousarray(a).view(np.uint32)
        r = ((u + (0x7FFF + ((u >> 16) & 1))) >> 16).astype(np.uint16)
        out[...] = np.where(np.isnan(a), np.uint16(0x7FC0), r)
    else:
        out[...] = a
