"""``cupycorr match``: where the pixels of one image are seen in another one."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

import cupycorr
from cupycorr import Geometry

from .. import environment, files, progress
from ..bench import features
from . import fields, search
from .grids import Floats

FLOW_WINDOW, STEREO_WINDOW = 9, 7
"""The best sizes among those tried on photographs; stereo needs less support."""


@click.command(short_help="Match two images: optical flow, or disparities.")
@click.argument("image_a", metavar="A", type=click.Path(exists=True, dir_okay=False))
@click.argument("image_b", metavar="B", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--out",
    "outputs",
    required=True,
    multiple=True,
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="What to write, by its suffix: .npy, .flo for flow, .pfm for disparities, or a picture's; "
    "repeatable.",
)
@click.option("--stereo", is_flag=True, help="A and B are the left and right view, rectified.")
@click.option(
    "--max-displacement",
    "reach",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    metavar="PIXELS",
    help="How far a match may be: along each axis, or for stereo from 0 to the left.",
)
@click.option(
    "--window",
    type=click.IntRange(1, 101),
    metavar="PIXELS",
    help="Size of the square whose costs are summed, odd.  "
    f"[default: {FLOW_WINDOW}, or {STEREO_WINDOW} for stereo]",
)
@click.option(
    "--full",
    type=click.FloatRange(min=0, min_open=True),
    metavar="PIXELS",
    help="Length of the fullest colour in pictures.  [default: such that 99 % are shorter]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to compute the cost volumes; results are the same.",
)
@click.option("--legend", is_flag=True, help="Show in pictures what the colours mean.")
def match(
    image_a: str,
    image_b: str,
    outputs: tuple[Path, ...],
    stereo: bool,
    reach: int,
    window: int | None,
    full: float | None,
    device: str,
    legend: bool,
) -> None:
    """Find where each pixel of image A is seen in image B, by their cost volume.

    Both images become maps of the census transform, 24 comparisons of each pixel with neighbours.
    Their cost volume, summed over a window, is largest where they look alike; a parabola through
    the largest value gives fractions of pixels. Flow is searched at a reduced size first and then
    corrected at twice the size, and so on; disparities are all tried. Pixels that do not lead back
    from B to A within a pixel, or of whose neighbours most disagree, have no match.

    In .flo and .npy (float32, H x W x 2) a flow is (dx, dy) for each pixel: what A shows at (x, y)
    is at (x + dx, y + dy) in B. A disparity (.npy: H x W) says how far to the left B shows it. No
    match is NaN, in .flo 1e10, in .pfm infinity, and in pictures black. A picture of a flow tells
    the direction by hue (right is red, down yellow, left cyan) and the length by saturation; one of
    disparities goes from dark blue, 0, to yellow.

    Exits with 2 if the options are wrong, or something is missing or cannot be read or written.
    """
    if window is None:
        window = STEREO_WINDOW if stereo else FLOW_WINDOW
    if window % 2 == 0:
        raise click.UsageError(f"--window must be odd, got {window}")
    environment.require_pillow()
    for path in outputs:
        fields.refuse(path, stereo)
    files.refuse("--out", outputs, inputs=(image_a, image_b))
    if legend and all(_is_array(path) for path in outputs):
        raise click.UsageError("--legend is for pictures, got none among --out")
    if device == "cuda":
        environment.require_cuda()
    one, two = features.load_pair(image_a, image_b)
    steps = search.stereo_steps if stereo else search.flow_steps
    plan = steps(one.shape, reach, window)
    needed = search.memory(one.shape, plan)
    environment.require_memory(f"matching {_size(one.shape)} pixels", needed)
    costs = search.count_costs(one.shape, plan)
    with progress.bar("match", costs) as advance:
        correlate = _on_cuda if device == "cuda" else cupycorr.correlation
        field = search.match(one, two, plan, advance, correlate)
    del one, two
    search.bound(field, reach)
    lengths = fields.lengths(field)
    if full is None:
        full = fields.full_range(lengths)
    for path in outputs:
        suffix = path.suffix.lower()
        content = fields.encode(suffix, field, stereo=stereo, full=full, legend=legend)
        files.write(path, content)
    # Now that the files are there, nobody need listen any more.
    _describe(lengths, "disparities" if stereo else "lengths")
    for path in outputs:
        click.echo(path if _is_array(path) else f"{path}, fullest colour {full:.2f} pixels")


def _is_array(path: Path) -> bool:
    return path.suffix.lower() in fields.ARRAYS


def _describe(lengths: Floats, what: str) -> None:
    """Print how many pixels have a match, and how far away those are."""
    known = lengths[~np.isnan(lengths)]
    if not known.size:
        click.echo("Warning: no pixel has a match; A and B may show different things", err=True)
    click.echo(f"{_size(lengths.shape)} pixels, {100 * known.size / lengths.size:.1f} % matched")
    if known.size:
        low, middle, high = np.quantile(known, (0, 0.5, 1))
        click.echo(f"{what} {low:.2f} to {high:.2f} pixels, median {middle:.2f}")


def _on_cuda(fmap1: Floats, fmap2: Floats, geometry: Geometry) -> Floats:
    """Compute the cost volume of NumPy arrays on the current CUDA device."""
    import cupy

    cost = cupycorr.correlation(cupy.asarray(fmap1), cupy.asarray(fmap2), geometry)
    result: Floats = cost.get()  # synchronises
    return result


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
