"""Choose the tiles of the CUDA product kernels by a model of what a multiprocessor does.

The model counts, for the multiprocessor that gets the most blocks, the cycles that a block keeps
each of its units busy: arithmetic, shared memory, instruction issue, and the path to global memory.
The unit that is busy longest decides; of all tiles that fit the device the fastest is taken. The
search sees the size of an image only to three binary digits (`size_class`), so that images of
about one size share one compiled kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import ceil, inf
from operator import itemgetter
from typing import NamedTuple

Constants = tuple[tuple[str, int | bool | str], ...]

MOST_THREADS = 256  # of a block: of larger ones too many threads wait at a barrier
MOST_REGISTERS = 255  # of a thread
REGISTERS = 65536  # of a multiprocessor
RESERVED_BYTES = 1024  # of shared memory per block, by the driver
LATENCY = 700  # cycles from a load of global memory to its use
LEVEL2_BYTES = 32  # per cycle and multiprocessor


class Device(NamedTuple):
    """What plans depend on."""

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
        """Multiply-adds in float32 per cycle and multiprocessor."""
        return 64 if self.capability in (70, 72, 75, 80) else 128

    @property
    def shared_rate(self) -> int:
        """Bytes of shared memory per cycle and multiprocessor."""
        return 64 if self.capability == 75 else 128


class Product(NamedTuple):
    """What the tile of a product volume depends on. Sizes are size classes."""

    samples: int
    """Samples times row phases."""
    channels: int
    rows: int
    """Lattice rows of a phase."""
    columns: int
    """Lattice columns of a phase."""
    patch: tuple[int, int]
    phases_x: int
    advance: tuple[int, int]
    accumulator: str
    vector: int
    lead: int
    asynchronous: bool


class Gradient(NamedTuple):
    """What the tile of a gradient depends on. Sizes are size classes, of the targets."""

    samples: int
    channels: int
    rows: int
    columns: int
    patch: tuple[int, int]
    phases_x: int
    advance: tuple[int, int]
    accumulator: str
    vector: int
    asynchronous: bool
    upstream_asynchronous: bool


class ProductTile(NamedTuple):
    """The tile of product.cu."""

    constants: Constants
    positions: int
    groups: int
    strips: int
    strips_per_row: int
    threads: int
    shared_bytes: int


class GradientTile(NamedTuple):
    """The tile of product_adjoint.cu."""

    constants: Constants
    positions: int
    groups: int
    rows: int
    channels: int
    channel_groups: int
    threads: int
    shared_bytes: int


class _Block(NamedTuple):
    """What a block of threads needs: registers and shared memory, and work for each unit."""

    threads: int
    registers: float
    """Of a thread; an estimate, fitted to compiled kernels."""
    shared_bytes: int
    rounds: int
    """How many times it fills its buffers."""
    multiply_adds: float
    """Of all threads, in all rounds, as are the other counts."""
    wavefronts: float
    """128-byte accesses of shared memory."""
    instructions: float
    """Of all threads, beside the multiply-adds."""
    words: float
    """Staged from global memory."""
    results: float
    """Stored to global memory."""
    ahead: bool
    """Whether it fetches while it computes."""


def size_class(size: int) -> int:
    """Round up to three binary digits."""
    digits = max(0, size.bit_length() - 3)
    return -(-size >> digits) << digits


def elements_per_load(dtype: str) -> int:
    """Return how many elements become 16 bytes of accumulators."""
    return 2 if dtype == "float64" else 4


def displacements_of_thread(patch: int, load: int) -> int:
    """Return how many displacements of a row a thread owns: all, or equal groups of up to 24.

    Groups start at multiples of ``load``, so that their windows are aligned.
    """
    if patch <= 24:
        return patch
    return min(range(24, 11, -load), key=lambda size: (-(-patch // size) * size, -size))


@lru_cache(maxsize=512)
def product_tile(problem: Product, device: Device) -> ProductTile | None:
    """Return the tile of the product volume that the model finds fastest; None if none fits."""
    fitting = (found for found in _product_tiles(problem, device) if found[0] < inf)
    return min(fitting, key=itemgetter(0), default=(inf, None))[1]


@lru_cache(maxsize=512)
def gradient_tile(problem: Gradient, device: Device) -> GradientTile | None:
    """Return the tile of the gradient that the model finds fastest; None if none fits."""
    fitting = (found for found in _gradient_tiles(problem, device) if found[0] < inf)
    return min(fitting, key=itemgetter(0), default=(inf, None))[1]


def _product_tiles(problem: Product, device: Device) -> Iterator[tuple[float, ProductTile]]:
    """Yield the tiles that fit, each with the cycles that the model gives it."""
    load = elements_per_load(problem.accumulator)
    word_bytes = 16 // load
    (patch_y, patch_x), (advance_y, advance_x) = problem.patch, problem.advance
    displacements = displacements_of_thread(patch_x, load)
    q_groups = -(-patch_x // displacements)
    row_strips = patch_y * q_groups
    buffers = 2 if problem.asynchronous else 1
    for positions, channel_groups in product((8, 4, 2), (1, 2, 4, 8)):
        window = _round_up(problem.lead + advance_x * (positions - 1) + displacements, load)
        sums = positions * displacements
        tile_registers = (sums + positions + window) * word_bytes // 4 + 12
        if positions % load or tile_registers > MOST_REGISTERS:
            continue
        for groups in _few(-(-problem.columns // positions)):
            columns, lanes = groups * positions, problem.phases_x * groups
            columns2 = problem.lead + advance_x * (columns - 1) + patch_x
            pitch1 = _odd_units(columns, load)
            last = advance_x * positions * (groups - 1) + displacements * (q_groups - 1)
            pitch2 = _odd_units(max(columns2, last + window), load)
            for strips in range(1, MOST_THREADS // (lanes * channel_groups) + 1):
                busy = lanes * strips * channel_groups
                threads = _round_up(busy, 32)
                if busy < 0.8 * threads:
                    continue
                rows1, rows2 = _staged_rows(strips, row_strips, q_groups, patch_y, advance_y)
                words = problem.phases_x * (rows1 * pitch1 + rows2 * pitch2)
                copies = sum(
                    _copies(rows, problem.phases_x * count, problem.vector, threads)
                    for rows, count in ((rows1, columns), (rows2, columns2))
                )
                line = channel_groups * strips * (lanes * positions + load)
                for chunk in (8, 4, 2, 1):
                    shared_bytes = max(buffers * chunk * words, line) * word_bytes
                    registers = tile_registers + 3 * copies + 2 * chunk
                    ahead = True
                    if not problem.asynchronous:
                        staged = chunk * copies * problem.vector * word_bytes // 4
                        ahead = registers + staged <= MOST_REGISTERS
                        # Else operands and words on their way take turns in the same registers.
                        operands = 0 if ahead else (positions + window) * word_bytes // 4
                        registers = max(registers, registers - operands + staged)
                    if chunk % channel_groups or chunk > problem.channels:
                        continue
                    if registers > MOST_REGISTERS:
                        continue
                    if shared_bytes > device.shared_bytes:
                        continue
                    loads = (positions + window) // load
                    block = _Block(
                        threads, registers, shared_bytes,
                        rounds=-(-problem.channels // chunk),
                        multiply_adds=problem.channels * sums * lanes * strips,
                        # Neighbouring strips share the words of the first map.
                        wavefronts=problem.channels * lanes * strips / 32
                        * (2 * positions + 5 * window) / load,
                        instructions=problem.channels * lanes * strips * (loads + 10)
                        + threads * -(-problem.channels // chunk)
                        * (35 + chunk * copies * (4 + (not problem.asynchronous) * problem.vector))
                        + sums * busy * 10,
                        words=problem.channels * copies * threads * problem.vector,
                        results=sums * lanes * strips,
                        ahead=ahead,
                    )  # fmt: skip
                    blocks = problem.samples * -(-problem.rows * row_strips // strips)
                    blocks *= -(-problem.columns // columns)
                    constants = {
                        "positions": positions, "displacements": displacements, "groups": groups,
                        "strips": strips, "channel_groups": channel_groups, "chunk": chunk,
                        "vector": problem.vector, "lead": problem.lead,
                        "rows1": rows1, "rows2": rows2, "pitch1": pitch1, "pitch2": pitch2,
                        "asynchronous": problem.asynchronous, "ahead": ahead, "buffers": buffers,
                        "threads": threads, "shared_words": shared_bytes // word_bytes,
                    }  # fmt: skip
                    yield (
                        _cycles(block, blocks, problem.accumulator, device),
                        ProductTile(
                            tuple(constants.items()), positions, groups, strips, row_strips,
                            threads, shared_bytes,
                        ),
                    )  # fmt: skip


def _gradient_tiles(problem: Gradient, device: Device) -> Iterator[tuple[float, GradientTile]]:
    """Yield the tiles that fit, each with the cycles that the model gives it."""
    load = elements_per_load(problem.accumulator)
    word_bytes, positions = 16 // load, load
    (patch_y, patch_x), (advance_y, advance_x) = problem.patch, problem.advance
    displacements = displacements_of_thread(patch_x, load)
    q_groups = -(-patch_x // displacements)
    window = _round_up(advance_x * (positions - 1) + displacements, load)
    some_asynchronous = problem.asynchronous or problem.upstream_asynchronous
    buffers = 2 if some_asynchronous else 1
    for channels, channel_groups in product((16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 32)):
        # The compiler holds no more of G and the window than there is room for.
        tile_registers = channels * positions * word_bytes // 4 + 90
        block_channels = channels * channel_groups
        if tile_registers > MOST_REGISTERS or block_channels >= 2 * problem.channels:
            continue
        for groups, rows in product(_few(-(-problem.columns // positions)), (1, 2, 4, 8)):
            columns, lanes = groups * positions, problem.phases_x * groups
            busy = lanes * rows * channel_groups
            threads = _round_up(busy, 32)
            wraps = advance_y * (rows - 1)
            if busy < 0.8 * threads or threads > MOST_THREADS or wraps >= patch_y:
                continue
            if rows >= 2 * problem.rows:
                continue
            source_columns = advance_x * (columns - 1) + patch_x
            pitch_g = _odd_units(columns, load)
            pitch_rows = _odd_units(patch_x * problem.phases_x * pitch_g, load)
            pitch_s = _odd_units(advance_x * (columns - 1) + _round_up(patch_x, load), load)
            slots = 2 if wraps else 1
            source_words = slots * block_channels * problem.phases_x * pitch_s
            line = channel_groups * rows * (lanes * positions + load)
            shared_bytes = max(buffers * (rows * pitch_rows + source_words), line) * word_bytes
            if shared_bytes > device.shared_bytes:
                continue
            source_copies = _copies(
                block_channels, problem.phases_x * source_columns, problem.vector, threads
            )
            g_copies = rows * _copies(patch_x, problem.phases_x * columns, 1, threads)
            staged = 0 if problem.asynchronous else slots * source_copies * problem.vector
            staged += 0 if problem.upstream_asynchronous else g_copies
            staged = staged * word_bytes // 4
            registers = tile_registers + 2 * g_copies + 1.3 * slots * source_copies
            ahead = registers + staged <= MOST_REGISTERS
            if some_asynchronous:
                ahead = True
                registers += staged
            else:
                registers = max(registers, registers - (0 if ahead else 60) + staged)
            if registers > MOST_REGISTERS:
                continue
            g_loads, window_loads = (
                patch_x * positions // load,
                channels * q_groups * window // load,
            )
            copies = patch_y * g_copies + (patch_y + wraps) * source_copies
            block = _Block(
                threads, registers, shared_bytes,
                rounds=patch_y,
                multiply_adds=patch_y * busy * channels * positions * patch_x,
                # Threads of several rows share the words of the source.
                wavefronts=patch_y * busy / 32
                * (4 * g_loads + (2 if rows > 2 else 4) * window_loads),
                instructions=patch_y * (
                    busy * (g_loads + window_loads) + threads * (100 + 30 * rows)
                ) + threads * copies * 5 + busy * channels * positions * 10,
                words=threads * (
                    patch_y * g_copies + (patch_y + wraps) * source_copies * problem.vector
                ),
                results=busy * channels * positions,
                ahead=ahead,
            )  # fmt: skip
            blocks = problem.samples * -(-problem.rows // rows) * -(-problem.columns // columns)
            blocks *= -(-problem.channels // block_channels)
            constants = {
                "positions": positions, "channels": channels, "displacements": displacements,
                "groups": groups, "rows": rows, "channel_groups": channel_groups,
                "vector": problem.vector,
                "pitch_g": pitch_g, "pitch_rows": pitch_rows, "pitch_s": pitch_s,
                "asynchronous": problem.asynchronous,
                "upstream_asynchronous": problem.upstream_asynchronous,
                "ahead": ahead, "buffers": buffers, "threads": threads,
                "shared_words": shared_bytes // word_bytes,
            }  # fmt: skip
            yield (
                _cycles(block, blocks, problem.accumulator, device),
                GradientTile(
                    tuple(constants.items()), positions, groups, rows, channels, channel_groups,
                    threads, shared_bytes,
                ),
            )  # fmt: skip


def _cycles(block: _Block, blocks: int, accumulator: str, device: Device) -> float:
    """Return the cycles of the multiprocessor that gets the most blocks."""
    resident = min(
        REGISTERS // (_round_up(ceil(block.registers), 8) * block.threads),
        device.shared_bytes_of_multiprocessor // (block.shared_bytes + RESERVED_BYTES),
        1024 // block.threads,
    )
    if resident < 1:
        return inf
    doubled = 2 if accumulator == "float64" else 1
    busy = max(
        block.multiply_adds / device.multiply_adds * doubled,
        (block.wavefronts + block.words * doubled / 32) * 128 / device.shared_rate,
        (block.multiply_adds + block.instructions) / 128,
        (block.words + block.results) * 4 * doubled / LEVEL2_BYTES,
    )
    most = -(-blocks // device.multiprocessors)
    together = min(resident, most)
    warps = together * block.threads // 32
    # Four schedulers share the warps; with few of them the pipelines run dry.
    efficiency = min(0.92, 0.5 + 0.13 * warps / 4) * warps / _round_up(warps, 4)
    # Blocks that wait for memory leave the multiprocessor to the others that are resident.
    waiting = LATENCY * (1 if block.ahead else block.rounds) / together
    return most * (busy / efficiency + waiting)


def _staged_rows(
    strips: int, row_strips: int, q_groups: int, patch_y: int, advance_y: int
) -> tuple[int, int]:
    """Return how many rows of the two maps a block of product.cu stages."""
    if strips < row_strips and row_strips % strips == 0 and strips % q_groups == 0:
        return 1, strips // q_groups
    whole = strips % row_strips == 0  # then a block begins with a row
    rows1 = strips // row_strips if whole else -(-(strips - 1) // row_strips) + 1
    return rows1, advance_y * (rows1 - 1) + patch_y


def _copies(rows: int, columns: int, vector: int, threads: int) -> int:
    """Return how many copies a thread makes for a rectangle, as staging.cuh deals them out."""
    units = -(-columns // vector)
    across = -(-units // threads)
    at_once = 1 if across > 1 else threads // units
    return across * -(-rows // at_once)


def _few(most: int) -> list[int]:
    """Return the powers of two up to the first that is not below ``most``, at most 32.

    With other numbers of groups, lanes that load at once would meet in the same banks.
    """
    return [1 << i for i in range(min(5, (most - 1).bit_length()) + 1)]


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _odd_units(count: int, load: int) -> int:
    """Round up to an odd number of 16-byte units.

    Then the units of eight consecutive rows lie in different banks of shared memory.
    """
    units = -(-count // load)
    return (units + 1 - units % 2) * load
