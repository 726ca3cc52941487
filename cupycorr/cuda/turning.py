"""Plan how maps reach tensor cores whose channels do not lie as they are needed.

Channels that lie apart are turned on their way to shared memory (``Runs`` in
``kernels/matrices.cuh``), or a launch of ``kernels/transpose.cu`` turns a whole map. The planners
of both kernels on tensor cores choose by what it costs.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from cupycorr.cuda.cost import SECTOR_BYTES, Device, multiprocessor_bytes
from cupycorr.cuda.launch import Launch, Shape, types
from cupycorr.layer import DTYPES

GROUP = 8  # pixels of a phase in a run, and slots of shared memory in a group
# Instructions of a thread per run of contiguous maps that it turns, and per load of it.
OF_RUN, LOAD = 26, 4
MORE = 32  # bytes of eight slots, beside those of pixels: neighbouring runs lie in other banks

SIDE, TURNING_THREADS = 64, 256  # of a block of transpose.cu
LAUNCH_CYCLES = 4000  # that a further launch costs; a guess


class Apart(NamedTuple):
    """How the pixels of contiguous maps lie, along a row."""

    step: int
    """Pixels between phases."""
    spacing: int
    """Pixels between displacements."""
    leads: tuple[int, ...]
    """Pixels before the first of a row of each map that is read, where loads are aligned."""


def turn(shape: Shape, dtype: str, given: str, turned: str, *, aligned: bool, back: bool) -> Launch:
    """Plan the exchange of the channels and pixels of a map or its gradient.

    Parameters
    ----------
    shape : (N, C, H, W)
        Shape of the map.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        Its dtype.
    given, turned : str
        Names of the array that is read, and of that which is written.
    aligned : bool
        Whether both begin at multiples of 16 bytes.
    back : bool
        Whether channels lie side by side in what is read, or in what is written.
    """
    samples, channels, height, width = shape
    size_a, size_b = (height * width, channels) if back else (channels, height * width)
    blocks_a, blocks_b = -(-size_a // SIDE), -(-size_b // SIDE)
    return Launch(
        "transpose.cu",
        "transpose",
        (
            *types(dtype),
            ("whole_reads", aligned and size_b % 2 == 0),
            ("whole_writes", aligned and size_a % 2 == 0),
            ("threads", TURNING_THREADS),
        ),
        samples * blocks_a * blocks_b,
        TURNING_THREADS,
        SIDE * (SIDE + 2) * DTYPES[dtype].itemsize,
        (given, turned),
        (
            *(("size_a", size_a), ("size_b", size_b)),
            *(("blocks_a", blocks_a), ("blocks_b", blocks_b)),
        ),
        scaled=False,
    )


def turning_cycles(shape: Shape, dtype: str, device: Device) -> float:
    """Return the cycles in which two arrays are turned."""
    moved = 2 * 2 * prod(shape) * DTYPES[dtype].itemsize  # each is read and written
    return moved / multiprocessor_bytes(device) + 2 * LAUNCH_CYCLES


class Staged(NamedTuple):
    """What it takes to turn rows of contiguous maps on their way to shared memory.

    Counts are those of a block, and of as many channels as are loaded at a time.
    """

    runs: int
    """Of a row."""
    groups: int
    """Of eight slots of a phase, those before the first row too."""
    lanes: int
    """Pairs of a run and a word of channels."""
    registers: int
    """Of a run, on its way."""
    instructions: float
    wavefronts: float
    bytes: float
    """In whole sectors."""


def staged(
    rows: int,
    columns: int,
    period: int,
    lead: int,
    channels: int,
    step: int,
    phases: int,
    vector: int,
    element_bytes: int,
) -> Staged:
    """Count what it takes to stage ``columns`` pixels, ``period`` apart, of each phase and row."""
    pixels = GROUP * period
    before = lead + step * (phases - 1)
    needed = before + period * (columns - 1) + 1
    runs = -(-needed // pixels)
    of_word = 4 // element_bytes
    lanes = rows * runs * channels // of_word
    # Through registers one by one, only those of a phase are loaded.
    loads = of_word * (GROUP * phases if vector == 1 else pixels // vector)
    words = GROUP * phases
    return Staged(
        runs,
        -(-(before // period) // GROUP) + rows * runs,
        lanes,
        loads if vector == 1 else of_word * pixels * element_bytes // 4,
        lanes * (OF_RUN + loads * LOAD + words * of_word),
        # A load of a warp takes pixels of four runs and eight words of channels.
        lanes * (words + loads * 8 * max(1, pixels * element_bytes / SECTOR_BYTES)) / 32,
        rows * channels * (needed + SECTOR_BYTES // element_bytes - vector) * element_bytes,
    )
