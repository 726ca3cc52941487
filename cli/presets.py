"""The layers and lookups of known networks, by the options of ``cupycorr bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from cupycorr.geometry import IntOrPair

from .options import LookupProblem, Problem, Sizes, Sweep, shown


def _pwc(batch: int, channels: int, height: int, width: int) -> dict[str, IntOrPair | str]:
    size: dict[str, IntOrPair | str] = {
        "batch_size": batch, "channel": channels, "height": height, "width": width,
    }  # fmt: skip
    return size | {"patch": 9}


def _raft(channels: int, height: int, width: int, radius: int) -> dict[str, IntOrPair | str]:
    return {
        "batch_size": 1, "channel": channels, "height": height, "width": width,
        "radius": radius, "levels": 4, "order": "xy",
    }  # fmt: skip


FLOWNETC: dict[str, IntOrPair | str] = {
    "batch_size": 4, "channel": 256, "height": 48, "width": 64, "patch": 21, "patch_dilation": 2,
}  # fmt: skip
PRESETS: dict[str, dict[str, IntOrPair | str]] = {
    # The defaults of spatial-correlation-sampler's benchmark.py.
    "default": {
        "batch_size": 16, "kernel_size": 3, "patch": 3, "patch_dilation": 2, "channel": 64,
        "height": 100, "width": 100, "stride": 2, "pad": 1, "dilation": 2,
    },
    "flownetc": FLOWNETC,
    "flownetc-s2": FLOWNETC | {"stride": 2},
    "pwc": _pwc(8, 128, 64, 112),
    # The levels of PWC-Net's pyramid on 448 x 896 pixels.
    "pwc-l2": _pwc(8, 32, 128, 224),
    "pwc-l3": _pwc(8, 64, 64, 112),
    "pwc-l4": _pwc(8, 96, 32, 56),
    "pwc-l5": _pwc(8, 128, 16, 28),
    "pwc-l6": _pwc(8, 196, 8, 14),
    "stereo": {"batch_size": 2, "channel": 128, "height": 96, "width": 160, "patch": (1, 41)},
    "k3-dense": {
        "batch_size": 2, "channel": 64, "height": 64, "width": 64,
        "kernel_size": 3, "patch": 9, "pad": 1,
    },
    # The lookups of RAFT at 436 x 1024 pixels, of its small form, at 1080 x 1920, and of stereo.
    "raft": _raft(256, 55, 128, 4),
    "raft-small": _raft(128, 46, 62, 3),
    "raft-1080p": _raft(256, 135, 240, 4),
    "raft-stereo": _raft(256, 96, 160, 4) | {"radius": (0, 4), "pool": (1, 2), "order": "yx"},
}  # fmt: skip


def preset_option(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with ``--preset``; it gets the names as ``presets``."""
    return click.option(
        "--preset",
        "presets",
        multiple=True,
        type=click.Choice([*PRESETS, "all"]),
        help="A known layer instead of the sizes above, which override its values where given; "
        "repeatable.",
    )(function)


def chosen_problems(
    sizes: Sizes,
    presets: tuple[str, ...],
    channels_last: bool = False,
    sweep: Sweep | None = None,
) -> list[Problem | LookupProblem]:
    """Return the problems of the presets, or that of the sizes if there is no preset.

    Those of a sweep's values follow one another.
    """
    names = list(PRESETS) if "all" in presets else list(dict.fromkeys(presets))
    cases: list[Any] = [(name, PRESETS[name]) for name in names]
    if not presets:
        cases = [("options" if sizes.given or sweep else "default", None)]
    problems = []
    for name, preset in cases:
        if sweep is None:
            problems.append(sizes.problem(name, preset))
            continue
        for value in sweep.values:
            title = f"{name}, {sweep.name}={shown(value)}"
            problem = sweep.applied(sizes, value).problem(title, preset)
            problems.append(problem._replace(swept=(sweep.name, value)))
    return [problem._replace(channels_last=channels_last) for problem in problems]
