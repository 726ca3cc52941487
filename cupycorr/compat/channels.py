"""The cost volume with its displacements in one axis, as channels of a feature map."""

from __future__ import annotations

from typing import Any

from cupycorr.api import correlate
from cupycorr.layer import Layer


def correlate_channels(fmap1: Any, fmap2: Any, layer: Layer, names: tuple[str, str]) -> Any:
    """Compute the cost volume (N, PH * PW, OH, OW), rows of displacements outermost.

    ``names`` are what errors call the maps.
    """
    cost = correlate(fmap1, fmap2, layer, names)
    samples, rows, columns, height, width = cost.shape
    return cost.reshape(samples, rows * columns, height, width)
