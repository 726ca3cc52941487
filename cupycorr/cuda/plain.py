"""Model what the plain kernels cost, to take them where a launch has too little work for tiles."""

from __future__ import annotations

from math import prod

from cupycorr.cuda.cost import SECTOR_BYTES, Block, Device, cycles_in_rounds
from cupycorr.cuda.launch import Shape
from cupycorr.layer import DTYPES, Layer

THREADS = 256  # per block of the plain and the taps kernels

# Read off NVRTC's machine code of plain.cu: registers, instructions of an output, of a tap of the
# cost volume and of a term in it, and how many terms it loads at a time;
REGISTERS, ONCE, TAP, TERM, AT_ONCE = 64, 150, 35, 6.3, 16
# registers of a gradient, instructions of an output, of a displacement, and of a tap.
GRADIENT_REGISTERS, GRADIENT_ONCE, DISPLACEMENT, GRADIENT_TAP = 44, 110, 75, 53


def cycles(layer: Layer, shape: Shape, dtype: str, device: Device, result: str) -> float:
    """Return the cycles of the multiprocessor that has most to do, in a launch of plain.cu.

    A thread waits for what it loads before it loads more. What a warp loads are neighbours; of the
    words that it loads for another displacement level 1 holds those of the map, and no others.
    """
    geometry, word_bytes = layer.geometry, DTYPES[dtype].itemsize
    cost_shape, channels = geometry.cost_shape(shape), shape[1]
    taps, displacements = geometry.taps, prod(geometry.patch_size)
    sectors = word_bytes + SECTOR_BYTES / 32  # bytes of a lane; a warp's begin anywhere
    if result == "cost":
        outputs, registers = prod(cost_shape), REGISTERS
        rounds = taps * -(-channels // AT_ONCE)
        instructions = ONCE + taps * (TAP + channels * TERM)
        loads = 2 * taps * channels
        moved = loads * sectors
    else:
        outputs, registers = prod(shape), GRADIENT_REGISTERS
        rounds = displacements
        instructions = GRADIENT_ONCE + displacements * (DISPLACEMENT + taps * GRADIENT_TAP)
        loads = displacements * (taps + 1)
        moved = (displacements * taps + 1) * sectors
    threads = min(THREADS, 32 * -(-outputs // 32))  # the others leave at once
    block = Block(
        threads,
        registers,
        0,
        rounds,
        wavefronts=loads * threads / 32,  # of level 1, which is shared memory's
        instructions=instructions * threads,
        bytes=(moved + word_bytes) * threads,
        ahead=False,
    )
    return cycles_in_rounds(block, -(-outputs // THREADS), DTYPES[dtype].accumulator, device)
