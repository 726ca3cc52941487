"""Match two images, or a stereo pair, by nothing but a cost volume.

    python examples/matching.py first.png second.png flow.png --reach 8
    python examples/matching.py left.png right.png disparities.png --stereo --reach 64

Needs Pillow (the extra ``images``). A file ``.npy`` gets the numbers: (2, H, W), x and y, in
pixels; a picture shows directions as hues and lengths as saturation, or disparities in grey.
`cupycorr match` does more: large motions, sharper edges, and where there is no match.
"""

import argparse

import numpy as np
from PIL import Image

from cupycorr import Geometry, correlation

WINDOW = 5
"""Pixels around a pixel that its features are taken from."""


def features(image):
    """Return a map (1, WINDOW**2, H, W): each pixel's surroundings, without their mean."""
    pad = WINDOW // 2
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(image, pad, mode="edge"), (WINDOW, WINDOW)
    ).reshape(*image.shape, -1)
    return np.moveaxis(windows - windows.mean(-1, keepdims=True), -1, 0)[None]


def geometry(reach, stereo):
    """Return what is compared: all displacements up to ``reach``, for stereo those to the left.

    Costs of 5 x 5 taps are summed, so that a pixel is compared together with its neighbours.
    """
    taps = {"kernel_size": 5, "padding": 2}
    if stereo:  # index d is the disparity: what is at x on the left is at x - d on the right
        return Geometry(
            patch_size=(1, reach + 1), dilation_patch=(1, -1), first_displacement=0, **taps
        )
    return Geometry(patch_size=2 * reach + 1, **taps)


def displacements(image1, image2, reach, stereo):
    """Return where each pixel of an image (H, W) is in the other: (2, H, W), x and y."""
    what = geometry(reach, stereo)
    # "cosine" makes features of length 1: brightness and contrast do not count.
    cost = correlation(features(image1), features(image2), what, normalize="cosine")[0]
    flat = cost.reshape(-1, *image1.shape)
    p, q = np.divmod(flat.argmax(0), cost.shape[1])
    found = []
    for axis, best, steps in ((1, q, what.displacements[1]), (0, p, what.displacements[0])):
        index = np.minimum(np.maximum(best, 1), max(1, len(steps) - 2))
        offset = np.zeros(image1.shape, np.float32)
        if len(steps) > 2:  # the vertex of the parabola through the cost and its neighbours
            near = [(p, index + k) if axis == 1 else (index + k, q) for k in (-1, 0, 1)]
            y, x = np.indices(image1.shape)
            low, mid, high = (cost[row, column, y, x] for row, column in near)
            curvature = low - 2 * mid + high
            peak = (index == best) & (curvature < 0)
            offset[peak] = (0.5 * (low - high) / np.where(peak, curvature, -1))[peak]
        found.append(steps.start + steps.step * (best + offset))
    return np.stack(found).astype(np.float32)


def picture(flow, reach, stereo):
    """Return an image of displacements."""
    if stereo:
        return Image.fromarray((255 * np.clip(-flow[0] / reach, 0, 1)).astype(np.uint8))
    hue = np.arctan2(flow[1], flow[0]) / (2 * np.pi) % 1
    length = np.minimum(np.hypot(*flow) / reach, 1)
    channels = np.stack([hue, length, np.ones_like(hue)], -1)
    return Image.fromarray((255 * channels).astype(np.uint8), "HSV").convert("RGB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("out")
    parser.add_argument("--reach", type=int, default=8, help="largest displacement, in pixels")
    parser.add_argument("--stereo", action="store_true", help="the second image is the right one")
    options = parser.parse_args()
    images = []
    for name in (options.first, options.second):
        with Image.open(name) as image:
            images.append(np.asarray(image.convert("L"), np.float32))
    if images[0].shape != images[1].shape:
        parser.error(f"the images must have one size, got {images[0].shape} and {images[1].shape}")
    flow = displacements(*images, options.reach, options.stereo)
    if options.out.endswith(".npy"):
        np.save(options.out, flow)
    else:
        picture(flow, options.reach, options.stereo).save(options.out)


if __name__ == "__main__":
    main()
