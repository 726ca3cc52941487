"""Model what blocks of the CUDA product kernels cost on a multiprocessor.

The model counts, for the multiprocessor that gets the most blocks, the cycles that each of its
units is busy: arithmetic, shared memory, instruction issue, and the path to global memory. The unit
that is busy longest decides. Its numbers are read off compiled kernels and data sheets. It serves
to choose between tiles; with counts of compiled kernels, kernels/README.md shows what it predicts.
"""

from __future__ import annotations

from functools import cache
from math import inf
from typing import NamedTuple

Constants = tuple[tuple[str, int | bool | str], ...]
"""The constants of a compiled kernel, by name: numbers, and types by their names."""

# Multiply-adds of float32 per clock and multiprocessor, by compute capability (CUDA C++
# Programming Guide, "Throughput of Native Arithmetic Instructions").
LANES = {
    50: 128, 52: 128, 53: 128, 60: 64, 61: 128, 62: 128, 70: 64, 72: 64, 75: 64, 80: 64,
    86: 128, 87: 128, 89: 128, 90: 128, 100: 128, 103: 128, 120: 128, 121: 128,
}  # fmt: skip
# Multiply-adds of 16-bit matrices per clock and multiprocessor (`mma.sync`, sums in float32): data
# sheets, for 9.0 what `mma.sync` reaches of them, for 10.0 a guess. Others have the least.
MATRIX_RATES = {80: 1024, 90: 1280, 100: 1024, 103: 1024}
LEAST_MATRIX_RATE = 256
REGISTERS = 65536  # per multiprocessor
# Threads per multiprocessor, by compute capability; of what is newer, a guess.
THREADS = {75: 1024, 86: 1536, 87: 1536, 89: 1536, 120: 1536, 121: 1536}
MOST_THREADS = 2048  # of all others
RESERVED_BYTES = 1024  # shared memory per block that the driver takes
ISSUE = 128  # instructions of threads per cycle: 4 schedulers, 32 lanes
WAVEFRONT_BYTES = 128
BARRIER = 60  # cycles that a block loses at a barrier; a guess
LATENCY = 700  # cycles from a load of global memory to its use; an estimate
# Bytes of level 2 per cycle and multiprocessor, by compute capability, and of others: estimates.
LEVEL2_RATES = {75: 21, 86: 16, 87: 16, 89: 16, 120: 16, 121: 16}
LEVEL2_RATE = 24
SECTOR_BYTES = 32  # the least that global memory moves
# Share of its peak that a multiprocessor reaches: it grows with the warps per scheduler, up to a
# limit. A guess from experience with such loops, not fitted to measurements.
EFFICIENCY, EFFICIENCY_PER_WARP, MOST_EFFICIENCY = 0.5, 0.13, 0.92


class Device(NamedTuple):
    """A GPU, as far as plans depend on it."""

    capability: int
    """Compute capability, 10 * major + minor."""
    multiprocessors: int
    shared_bytes: int
    """Shared memory that a block may ask for."""
    shared_bytes_of_multiprocessor: int

    @property
    def copies_asynchronously(self) -> bool:
        """Whether copies from global to shared memory can bypass the registers."""
        return self.capability >= 80

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds in float32 per cycle and multiprocessor; of what is newer, a guess."""
        return LANES.get(self.capability, 128)

    @property
    def threads(self) -> int:
        """Threads that a multiprocessor holds."""
        return THREADS.get(self.capability, MOST_THREADS)

    @property
    def level2_rate(self) -> int:
        """Bytes of level 2 per cycle and multiprocessor."""
        return LEVEL2_RATES.get(self.capability, LEVEL2_RATE)

    @property
    def shared_rate(self) -> int:
        """Bytes of shared memory per cycle and multiprocessor."""
        return 64 if self.capability == 75 else 128


class Block(NamedTuple):
    """A block of threads: the registers and shared memory that it needs, and its work."""

    threads: int
    registers: int
    """Registers per thread; an estimate, fitted to compiled kernels."""
    shared_bytes: int
    rounds: int = 1
    """How many times the block fills its buffers."""
    multiply_adds: float = 0
    """Multiply-adds (l1: additions) of the whole block, all rounds. The counts below likewise."""
    wavefronts: float = 0
    """128-byte accesses of shared memory."""
    instructions: float = 0
    """Instructions of threads, beside the multiply-adds."""
    words: float = 0
    """Words that are staged in shared memory."""
    bytes: float = 0
    """Bytes that are read from global memory and written to it, in whole sectors."""
    ahead: bool = True
    """Whether the block fetches while it computes."""
    matrix_cycles: float = 0
    """Cycles that the tensor cores are busy."""


def cycles_in_rounds(block: Block, blocks: int, accumulator: str, device: Device) -> float:
    """Return the cycles of the multiprocessor that gets the most of ``blocks`` equal blocks.

    Infinity where not even one block fits a multiprocessor. A round's words are on their way while
    those of the one before it are multiplied: by this block and by those that share the
    multiprocessor with it. What that does not fill is waited for.
    """
    at_once = resident(block, device)
    if at_once < 1:
        return inf
    busy = busy_cycles(block, accumulator, device)
    most = -(-blocks // device.multiprocessors)
    together = min(at_once, most)
    efficiency = _efficiency(block.threads // 32, together, most)
    # Blocks that wait for memory leave the multiprocessor to the others that are resident.
    waiting = LATENCY * (1 if block.ahead else block.rounds) / together
    between: float = BARRIER if block.shared_bytes else 0  # rounds
    if block.ahead:
        between += max(0, LATENCY - together * (busy / block.rounds))
    waits = most / together * (block.rounds - 1) * between
    return most * (busy / efficiency + waiting) + waits


@cache
def _efficiency(warps: int, together: int, most: int) -> float:
    """Return the share of its peak that a multiprocessor reaches with blocks of so many warps.

    Four schedulers share the warps; with few of them the pipelines run dry. With one block more at
    a time it is no slower, though that leaves its schedulers unequal numbers of warps; but at the
    end all of them must have been served.
    """

    def share(blocks: int) -> float:
        return min(MOST_EFFICIENCY, EFFICIENCY + EFFICIENCY_PER_WARP * blocks * warps / 4)

    def balance(blocks: int) -> float:
        return blocks * warps / round_up(blocks * warps, 4)

    fewer = range(max(1, together - 3), together + 1)  # one of them, or few, fills all schedulers
    return min(max(share(n) * balance(n) for n in fewer), share(together) * balance(most))


def busy_cycles(block: Block, accumulator: str, device: Device) -> float:
    """Return how long the unit of a multiprocessor is busy that a block needs longest."""
    doubled = 2 if accumulator == "float64" else 1
    return max(
        block.multiply_adds / device.multiply_adds * doubled,
        block.matrix_cycles,
        (block.wavefronts + block.words * doubled / 32) * WAVEFRONT_BYTES / device.shared_rate,
        (block.multiply_adds + block.instructions) / ISSUE,
        block.bytes / device.level2_rate,
    )


def resident(block: Block, device: Device) -> int:
    """Return how many blocks a multiprocessor holds at a time.

    Each of its four schedulers has a quarter of the registers.
    """
    warps = 4 * (REGISTERS // 4 // (round_up(block.registers, 8) * 32))
    return min(
        warps // (block.threads // 32),
        device.shared_bytes_of_multiprocessor // (block.shared_bytes + RESERVED_BYTES),
        device.threads // block.threads,
    )


def room(block: Block, device: Device) -> int:
    """Return the bytes of shared memory that a block may ask for, and as many blocks still fit."""
    at_once = max(1, resident(block, device))
    of_block = device.shared_bytes_of_multiprocessor // at_once - RESERVED_BYTES
    return min(device.shared_bytes, of_block)


def wavefronts(units: list[int | None]) -> int:
    """Return the wavefronts of a warp's 16-byte load of shared memory.

    ``units`` are the lanes' addresses in 16 bytes, or None. A quarter of the warp takes as many as
    some bank is asked for different words; halves of it take turns only where neighbouring lanes,
    or those at distance 2, ask for different words.
    """
    found = 0
    for half in (units[:16], units[16:]):
        together = any(
            all(
                half[i] == half[i + d] or None in (half[i], half[i + d])
                for i in range(16)
                if not i & d
            )
            for d in (1, 2)
        )
        for part in (half,) if together else (half[:8], half[8:]):
            banks = [word % 8 for word in set(part) if word is not None]
            found += max(map(banks.count, banks), default=0)
    return found


def matrix_rate(device: Device) -> int:
    """Return the multiply-adds of 16-bit matrices per cycle and multiprocessor."""
    return MATRIX_RATES.get(device.capability, LEAST_MATRIX_RATE)


def multiprocessor_bytes(device: Device) -> int:
    """Return the bytes that all multiprocessors together read or write per cycle."""
    return device.level2_rate * device.multiprocessors


def size_class(size: int, digits: int = 3) -> int:
    """Round up to some binary digits."""
    others = max(0, size.bit_length() - digits)
    return -(-size >> others) << others


def elements_per_load(dtype: str) -> int:
    """Return how many elements become 16 bytes of accumulators."""
    return 2 if dtype == "float64" else 4


def least_displacements(patch: int) -> int:
    """Return how many vertical displacements of a row have strips, if only some have, at least."""
    return patch - patch // 2


def displacements_of_thread(patch: int, load: int) -> int:
    """Return how many displacements of a row a thread owns: all, or equal groups of up to 24.

    Groups start at multiples of ``load``, so that their source columns are aligned.
    """
    if patch <= 24:
        return patch
    return min(range(24, 11, -load), key=lambda size: (-(-patch // size) * size, -size))


def copies_of_thread(rows: int, columns: int, vector: int, threads: int) -> int:
    """Return how many copies a thread makes for a rectangle, as staging.cuh deals them out."""
    units = -(-columns // vector)
    across = -(-units // threads)
    at_once = 1 if across > 1 else threads // units
    return across * -(-rows // at_once)


def bytes_of_rows(rows: float, columns: int, word_bytes: int, step: int = 1) -> float:
    """Return the bytes that move with rows of words that lie ``step`` words apart.

    A row begins anywhere in a sector.
    """
    return rows * (columns * min(word_bytes * step, SECTOR_BYTES) + SECTOR_BYTES - word_bytes)


def powers_of_two(most: int) -> list[int]:
    """Return the powers of two up to the first that is not below ``most``, at most 32.

    With other numbers of groups, lanes that load at once would meet in the same banks.
    """
    return [1 << i for i in range(min(5, (most - 1).bit_length()) + 1)]


def round_up(count: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-count // multiple) * multiple


def odd_units(count: int, load: int) -> int:
    """Round up to an odd number of 16-byte units.

    Then the units of eight consecutive rows lie in different banks of shared memory.
    """
    units = -(-count // load)
    return (units + 1 - units % 2) * load
