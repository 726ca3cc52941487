"""Choose the tiles of the CUDA product kernels: the fastest by `cost` that fit the device.

The search sees the sizes of an image only to four binary digits (`cost.size_class`), so that images
of about one size share one compiled kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from heapq import nsmallest
from itertools import product
from math import ceil, inf
from operator import itemgetter
from typing import NamedTuple, TypeVar

from cupycorr.cuda.cost import (
    Block,
    Constants,
    Device,
    bytes_of_rows,
    copies_of_thread,
    cycles_in_rounds,
    displacements_of_thread,
    elements_per_load,
    least_displacements,
    odd_units,
    powers_of_two,
    resident,
    room,
    round_up,
    wavefronts,
)

MOST_THREADS = 256  # per block: with more, too many threads wait at a barrier
MOST_REGISTERS = 255  # per thread
MOST_SLOTS = 8  # for source rows of a gradient
# With many copies in a round the compiler holds many addresses; few channels are exempt.
MOST_COPIES, FEW_CHANNELS = 32, 8
REFINED = 5  # kinds of tiles that are tried with all numbers of strips
LIKELY_CHUNK = 2  # channels that a block stages at least, if they fit
LEAST_BUSY = 0.8  # share of a block's threads that have outputs

# For l1, instructions in place of a multiply-add: two additions, and two comparisons in gradients.
ADDITIONS, COMPARISONS = 2, 2
FAR = 1 << 20  # 16-byte units, beyond all shared memory
DIFFERENCES = 24  # registers for what a thread holds until it is added

# The counts below are read off NVRTC's machine code of product.cu and product_adjoint.cu, for the
# layers of tests/support/devices.py; tests/kernels/test_nvrtc.py holds the registers to budgets.
# product.cu: registers per thread, per sum and operand, per copy on its way to shared memory, and,
# if that leads through registers, per copy of a channel,
OFFSETS, VALUE_OFFSETS, FLIGHT_OFFSETS, COPY_OFFSETS = 30, 0.9, 0.35, 0.7
# instructions before the first round and behind the last, of each copy whose place is found,
ONCE, PRODUCT_PLACE = 200, 16
# of a round beside its copies, and of a copy, asynchronous or not, and of a channel beside loads,
FETCH, COPY, CHANNEL = {True: 43, False: 27}, {True: 2.4, False: 3}, 6
# and of the places that a thread serves between two barriers, of a store, of one by a thread that
# shares its place, and of a result.
PLACE, STORE, SHARED_STORE, RESULT = 45, 3, 8, 2
# Where only some displacements have strips: instructions beside, of a row that is passed, and of a
# store of zeros.
SEARCH, SEARCH_ROW, ZERO = 100, 8, 14
# product_adjoint.cu: registers per thread, per sum, per word of G that is held, of which the
# compiler holds no more than so many, per copy of the source, and per column whose copies a thread
# makes; and more for the first map,
GRADIENT_OFFSETS, SUM_OFFSETS, HELD_OFFSETS, MOST_HELD, SOURCE_OFFSETS = 30, 1.7, 0.85, 48, 0.9
COLUMN_OFFSETS, FIRST_OFFSETS = 5, 6
HELD_OPERANDS = 60  # registers of operands, free while words are on their way
# instructions of a step beside loads, of a slot for a source row, of a copy, and of a word that is
# stored for it,
STEP, SLOT, GRADIENT_COPY, GRADIENT_WORD = 47, 38, 4, 2
# before the first step and behind the last, of each copy of G whose place is found, of a sum, and,
# for each of the maps, of a copy of the source and of a slot for its rows,
GRADIENT_ONCE, G_PLACE, SUM = 230, 38, 1.3
SOURCE_PLACE, SLOT_PLACE = {1: 16, 2: 24}, {1: 45, 2: 95}
# and of the places that a thread serves between two barriers, of a store, of a result in it, and of
# a store of zeros.
GRADIENT_PLACE, GRADIENT_STORE, GRADIENT_RESULT, ZEROS = 80, 4.5, 2.6, 7.5


class Product(NamedTuple):
    """A product volume, as far as its tile depends on it. Sizes are rounded (`size_class`)."""

    samples: int
    """Samples times row phases."""
    channels: int
    rows: int
    """Lattice rows of a phase."""
    columns: int
    """Lattice columns of a phase."""
    patch: tuple[int, int]
    present: float
    """Share of the strips whose row of the second map exists; 1 if all must be computed."""
    step_x: int
    """Pixels between neighbouring columns."""
    phases_x: int
    advance: tuple[int, int]
    accumulator: str
    element_bytes: int
    result_bytes: int
    vector: int
    lead: int
    result_vector: int
    asynchronous: bool
    l1: bool
    """Whether absolute differences are summed, not products."""


class Gradient(NamedTuple):
    """A gradient, as far as its tile depends on it. Sizes are those of the targets, rounded."""

    which: int
    samples: int
    channels: int
    rows: int
    columns: int
    patch: tuple[int, int]
    step: tuple[int, int]
    """Pixels between targets."""
    phases_x: int
    advance: tuple[int, int]
    accumulator: str
    element_bytes: int
    upstream_bytes: int
    vector: int
    upstream_vector: int
    result_vector: int
    asynchronous: bool
    upstream_asynchronous: bool
    l1: bool


class ProductTile(NamedTuple):
    """The tile of product.cu."""

    constants: Constants
    positions: int
    groups: int
    strips: int
    least: int
    """Vertical displacements of a row that have strips, at least; all if patch."""
    q_groups: int
    threads: int
    shared_bytes: int
    cycles: float
    """Of the multiprocessor that has most to do, by the model."""


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


Tile = TypeVar("Tile", ProductTile, GradientTile)


@lru_cache(maxsize=512)
def product_tile(
    problem: Product, device: Device, rank: int = 0
) -> tuple[float, ProductTile] | None:
    """Return the tile of the product volume that the model finds fastest, and its cycles there.

    With a rank, the one that is faster than all but so many; None where no more fit.
    """
    return _ranked(_product_tiles(problem, device, likely=True), rank)


@lru_cache(maxsize=512)
def gradient_tile(
    problem: Gradient, device: Device, rank: int = 0
) -> tuple[float, GradientTile] | None:
    """Return the tile of the gradient that the model finds fastest, as `product_tile` does."""
    return _ranked(_gradient_tiles(problem, device), rank)


def _ranked(tiles: Iterator[tuple[float, Tile]], rank: int) -> tuple[float, Tile] | None:
    fitting = (found for found in tiles if found[0] < inf)
    best = nsmallest(rank + 1, fitting, key=itemgetter(0))
    return best[rank] if rank < len(best) else None


class _Columns(NamedTuple):
    """The columns of a thread and of a block of product.cu."""

    positions: int
    """Positions per thread."""
    displacements: int
    """Displacements per thread."""
    source: int
    """Words of map 2 that a thread reads for a channel, rounded up to whole loads."""
    groups: int
    lanes: int
    """Threads along x."""
    staged1: int
    """Columns of a phase of map 1."""
    staged2: int
    pitch1: int
    pitch2: int


def _product_tiles(
    problem: Product, device: Device, *, likely: bool = False
) -> Iterator[tuple[float, ProductTile]]:
    """Yield the tiles that fit, each with the cycles that the model gives it.

    All of them, or only those among which the best is likely to be: some numbers of strips, and
    all numbers with what was among the best with those.
    """
    load, fewest = elements_per_load(problem.accumulator), LIKELY_CHUNK if likely else 1
    best: dict[tuple[_Columns, int, int], tuple[float, set[int]]] = {}
    patch = problem.patch[0]
    leasts = (patch,) if problem.present == 1 else (patch, least_displacements(patch))
    kinds = product((8, 4, 2), (1, 2, 4, 8), leasts)
    for positions, channel_groups, least in kinds:
        if positions % load:
            continue
        for groups in powers_of_two(-(-problem.columns // positions)):
            columns = _columns(problem, positions, groups, load)
            lanes = columns.lanes * channel_groups
            tried = set(range(1, MOST_THREADS // lanes + 1))
            if likely:
                present = 1 if least == patch else problem.present
                tried = _likely_strips(problem, columns, lanes, present, device)
            cycles = inf
            for strips in sorted(tried):
                for found in _tiles_of_strips(
                    problem, device, columns, strips, channel_groups, least, fewest
                ):
                    cycles = min(cycles, found[0])
                    yield found
            best[columns, channel_groups, least] = cycles, tried
    for kind in nsmallest(REFINED, best, key=lambda kind: best[kind][0]):
        columns, channel_groups, least = kind
        every = range(1, MOST_THREADS // (columns.lanes * channel_groups) + 1)
        for strips in sorted(set(every) - best[kind][1]):
            yield from _tiles_of_strips(
                problem, device, columns, strips, channel_groups, least, fewest
            )


def _likely_strips(
    problem: Product, own: _Columns, lanes: int, present: float, device: Device
) -> set[int]:
    """Return numbers of strips that fill warps, or share rows, or share blocks out evenly."""
    row_strips = problem.patch[0] * -(-problem.patch[1] // own.displacements)
    others = problem.samples * -(-problem.columns // own.staged1)
    all_strips = ceil(problem.rows * row_strips * present)
    found = set()
    for threads in (32, 64, 96, 128, 192, MOST_THREADS):
        most = threads // lanes
        if most == 0:
            continue
        blocks = -(-others * -(-all_strips // most) // device.multiprocessors)
        even = -(-all_strips // max(1, blocks * device.multiprocessors // others))
        found |= {most, even, most - most % row_strips}
        found.add(next(strips for strips in range(most, 0, -1) if row_strips % strips == 0))
    return {strips for strips in found if 0 < strips * lanes <= MOST_THREADS}


def _columns(problem: Product, positions: int, groups: int, load: int) -> _Columns:
    patch, advance = problem.patch[1], problem.advance[1]
    displacements = displacements_of_thread(patch, load)
    source = round_up(problem.lead + advance * (positions - 1) + displacements, load)
    staged = groups * positions
    staged2 = problem.lead + advance * (staged - 1) + patch
    last = advance * positions * (groups - 1) + round_up(patch, displacements) - displacements
    return _Columns(
        positions, displacements, source, groups, problem.phases_x * groups, staged, staged2,
        odd_units(staged, load), odd_units(max(staged2, last + source), load),
    )  # fmt: skip


def _tiles_of_strips(
    problem: Product,
    device: Device,
    own: _Columns,
    strips: int,
    channel_groups: int,
    least: int,
    fewest: int,
) -> Iterator[tuple[float, ProductTile]]:
    """Yield the tiles of so many strips and channel groups; they differ in the channels staged.

    Of rows that have ``least`` vertical displacements at least. Fewer than ``fewest`` channels only
    where no more fit.
    """
    load = elements_per_load(problem.accumulator)
    word_bytes = 16 // load
    busy = own.lanes * strips * channel_groups
    threads = round_up(busy, 32)
    if busy < LEAST_BUSY * threads:
        return
    q_groups = -(-problem.patch[1] // own.displacements)
    row_strips = problem.patch[0] * q_groups
    trimmed, present = least < problem.patch[0], 1.0
    rows1, rows2 = _staged_rows(strips, row_strips, q_groups, problem.patch[0], problem.advance[0])
    if trimmed:
        present = problem.present
        rows2 = problem.advance[0] * -(-(strips - 1) // row_strips) + problem.patch[0]
        rows1 = min(problem.rows, -(-(strips - 1) // (least * q_groups)) + 1)
    read1 = min(rows1, -(-(strips - 1) // row_strips) + 1)  # rows of a block amid the map
    words = problem.phases_x * (rows1 * own.pitch1 + rows2 * own.pitch2)
    staged_words = problem.phases_x * (read1 * own.staged1 + rows2 * own.staged2)
    copies = sum(
        copies_of_thread(rows, problem.phases_x * columns, problem.vector, threads)
        for rows, columns in ((rows1, own.staged1), (rows2, own.staged2))
    )
    line = channel_groups * strips * (own.lanes * own.positions + load)
    sums, operands = own.positions * own.displacements, own.positions + own.source
    blocks = problem.samples * ceil(problem.rows * row_strips * present / strips)
    blocks *= -(-problem.columns // own.staged1)
    zeros = (1 / present - 1) * strips * own.displacements  # lines that have no strips
    bytes_moved = bytes_of_rows(
        strips * own.displacements + zeros, problem.phases_x * own.staged1, problem.result_bytes
    ) + problem.channels * sum(
        bytes_of_rows(rows, problem.phases_x * columns, problem.element_bytes, problem.step_x)
        for rows, columns in ((read1, own.staged1), (rows2, own.staged2))
    )
    buffers = 2 if problem.asynchronous else 1
    several = channel_groups > 1 and own.lanes * strips < 32  # of a warp
    wavefronts1, wavefronts2 = _product_wavefronts(
        own, problem.phases_x, problem.advance, row_strips, q_groups,
        strips * several, _bank(words, load) * several, load,
    )  # fmt: skip
    channels = -(-problem.channels // channel_groups)  # of a thread
    fits = False
    for chunk in (16, 8, 4, 2, 1):
        if chunk % channel_groups or chunk > problem.channels:
            continue
        if chunk > FEW_CHANNELS and chunk * copies > MOST_COPIES:
            continue
        if fits and chunk < fewest:
            return
        numbers = round_up(strips, 4) * 4 * trimmed  # bytes of the strips' numbers
        shared_bytes = max(buffers * chunk * words, line) * word_bytes + numbers
        values = sums + operands + (DIFFERENCES if problem.l1 else 0)
        offsets = (
            OFFSETS + (FLIGHT_OFFSETS * chunk if problem.asynchronous else COPY_OFFSETS) * copies
        )
        registers = ceil(VALUE_OFFSETS * values * word_bytes / 4 + offsets)
        ahead = True
        if not problem.asynchronous:
            staged = chunk * copies * problem.vector * word_bytes // 4
            ahead = registers + staged <= MOST_REGISTERS
            # Else operands and words on their way take turns in the same registers.
            shared = 0 if ahead else operands * word_bytes // 4
            registers = max(registers, registers - shared + staged)
        if registers > MOST_REGISTERS or shared_bytes > device.shared_bytes:
            continue
        fits = True
        fetching = FETCH[problem.asynchronous] + chunk * copies * COPY[problem.asynchronous]
        rounds = -(-problem.channels // chunk)
        at_once = room(Block(threads, registers, shared_bytes), device) - numbers
        at_once //= line * word_bytes
        slices, storing = _storing(problem, own, strips, channel_groups, threads, at_once)
        shared_bytes = max(shared_bytes, slices * line * word_bytes + numbers)
        if trimmed:
            storing += SEARCH + SEARCH_ROW * (problem.rows / 2 + 2 * rows1)
            storing += zeros * own.lanes * own.positions / problem.result_vector / threads * ZERO
        block = Block(
            threads,
            registers,
            shared_bytes,
            rounds,
            multiply_adds=channels * sums * threads * (ADDITIONS if problem.l1 else 1),
            wavefronts=channels * channel_groups * own.lanes * strips / 32
            * (wavefronts1 * own.positions + wavefronts2 * own.source) / load
            + 2 * sums * threads * word_bytes / 128,
            instructions=threads * (channels * (operands // load + CHANNEL) + rounds * fetching)
            + threads * (ONCE + PRODUCT_PLACE * copies + fetching + storing),
            words=problem.channels * staged_words,
            bytes=bytes_moved,
            ahead=ahead,
        )  # fmt: skip
        constants = {
            "positions": own.positions, "displacements": own.displacements, "groups": own.groups,
            "strips": strips, "least": least, "channel_groups": channel_groups, "chunk": chunk,
            "vector": problem.vector, "lead": problem.lead,
            "rows1": rows1, "rows2": rows2, "pitch1": own.pitch1, "pitch2": own.pitch2,
            "asynchronous": problem.asynchronous, "ahead": ahead, "buffers": buffers,
            "threads": threads, "shared_words": (shared_bytes - numbers) // word_bytes,
            "resident": resident(block, device),
        }  # fmt: skip
        tile = ProductTile(
            tuple(constants.items()), own.positions, own.groups, strips, least, q_groups,
            threads, shared_bytes,
            cycles_in_rounds(block, blocks, problem.accumulator, device),
        )  # fmt: skip
        yield tile.cycles, tile


@lru_cache(maxsize=1024)
def _product_wavefronts(
    own: _Columns,
    phases: int,
    advance: tuple[int, int],
    row_strips: int,
    q_groups: int,
    strips: int,
    channel_words: int,
    load: int,
) -> tuple[float, float]:
    """Return the wavefronts of a warp's 16-byte loads of product.cu, of each map.

    The mean of a warp that begins with a row and of one amid it. Strips, and words of a channel,
    matter only where a warp has several channel groups; else they are 0.
    """
    found = [0, 0]
    for start in (0, row_strips // 2):
        units1: list[int | None] = []
        units2: list[int | None] = []
        for thread in range(32):
            phase, group = divmod(thread % own.lanes, own.groups)
            channel_group, strip = 0, thread // own.lanes
            if strips:
                channel_group, strip = divmod(strip, strips)
            row, rest = divmod(start + strip, row_strips)
            p, q_group = divmod(rest, q_groups)
            begin, column = channel_group * channel_words, own.positions * group
            at1 = (row * phases + phase) * own.pitch1 + column
            at2 = ((advance[0] * row + p) * phases + phase) * own.pitch2
            at2 += advance[1] * column + own.displacements * q_group
            units1.append((begin + at1) // load)
            units2.append((begin + at2) // load)
        found[0] += wavefronts(units1)
        found[1] += wavefronts(units2)
    return found[0] / 2, found[1] / 2


def _bank(words: int, load: int) -> int:
    """Return a distance to the same bank as ``words``, that is to no word nearby.

    Fewer distances that differ are met more often.
    """
    return words % (8 * load) + FAR * load


@lru_cache(maxsize=1024)
def _gradient_wavefronts(
    groups: int,
    rows: int,
    channel_groups: int,
    phases: int,
    advance: tuple[int, int],
    patch_y: int,
    pitches: tuple[int, int, int],
    slot_words: int,
    load: int,
) -> tuple[float, float]:
    """Return the wavefronts of a warp's 16-byte loads of product_adjoint.cu.

    Of G, and of the source in the mean over the steps: in the first, some rows read another slot.
    """
    pitch_g, pitch_rows, pitch_s = pitches
    wraps = min(advance[0] * (rows - 1), patch_y - 1)  # from this step on all are alike
    of_g, of_source = 0, 0
    for step in range(wraps + 1):
        g: list[int | None] = []
        source: list[int | None] = []
        for thread in range(32):
            rest, row = divmod(thread, rows)
            lane, channel_group = divmod(rest, channel_groups)
            phase, group = divmod(lane % (phases * groups), groups)
            slot = max(0, -(-(advance[0] * row - step) // patch_y))
            g.append((row * pitch_rows + phase * pitch_g + group * load) // load)
            at = (channel_group * phases + phase) * pitch_s + advance[1] * load * group
            source.append((at + slot * slot_words) // load)
        of_g = wavefronts(g)
        of_source += wavefronts(source) * (patch_y - wraps if step == wraps else 1)
    return of_g, of_source / patch_y


def _storing(
    problem: Product, own: _Columns, strips: int, channel_groups: int, threads: int, at_once: int
) -> tuple[int, float]:
    """Return how results leave a block of product.cu.

    Returns
    -------
    int
        The displacements of a thread that leave together: equal parts, of up to ``at_once``.
    float
        Instructions of a thread.
    """
    passes = -(-own.displacements // max(1, at_once))
    slices = -(-own.displacements // passes)
    places = own.lanes * strips * own.positions // problem.result_vector
    sharers = max(1, threads // places)  # threads that serve a place
    store = STORE + channel_groups + (RESULT + channel_groups - 1) * problem.result_vector
    store += SHARED_STORE if sharers > 1 else 0
    at_place = PLACE + -(-slices // sharers) * store
    to_shared = own.displacements * own.positions / elements_per_load(problem.accumulator)
    return slices, passes * -(-places * sharers // threads) * at_place + to_shared


def _staged_rows(
    strips: int, row_strips: int, q_groups: int, patch_y: int, advance_y: int
) -> tuple[int, int]:
    """Return how many rows of the two maps a block of product.cu stages."""
    if strips < row_strips and row_strips % strips == 0 and strips % q_groups == 0:
        return 1, strips // q_groups
    whole = strips % row_strips == 0  # then a block begins with a row
    rows1 = strips // row_strips if whole else -(-(strips - 1) // row_strips) + 1
    return rows1, advance_y * (rows1 - 1) + patch_y


def _gradient_tiles(problem: Gradient, device: Device) -> Iterator[tuple[float, GradientTile]]:
    """Yield the tiles that fit, each with the cycles that the model gives it."""
    positions = elements_per_load(problem.accumulator)
    for channels, channel_groups in product((16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 32)):
        if channels * channel_groups >= 2 * problem.channels:
            continue
        most_groups = -(-problem.columns // positions)
        for groups, rows in product(powers_of_two(most_groups), (1, 2, 4, 8)):
            if rows >= 2 * problem.rows:
                continue
            found = _gradient_of(problem, device, channels, channel_groups, groups, rows)
            if found:
                yield found


def _gradient_of(
    problem: Gradient, device: Device, channels: int, channel_groups: int, groups: int, rows: int
) -> tuple[float, GradientTile] | None:
    """Return the tile of these sizes and its cycles, if it fits."""
    positions = load = elements_per_load(problem.accumulator)
    word_bytes = 16 // load
    (patch_y, patch_x), (advance_y, advance_x) = problem.patch, problem.advance
    which = problem.which
    columns, lanes = groups * positions, problem.phases_x * groups
    busy = lanes * rows * channel_groups
    threads = round_up(busy, 32)
    if busy < LEAST_BUSY * threads or threads > MOST_THREADS:
        return None

    # Shared memory: G of every row, and a slot for every row of the source that a step needs.
    some_asynchronous = problem.asynchronous or problem.upstream_asynchronous
    buffers = 2 if some_asynchronous else 1
    source_rows = advance_y * (rows - 1) + patch_y
    slots = -(-source_rows // patch_y)
    pitch_g = odd_units(columns, load)
    pitch_rows = odd_units(patch_x * problem.phases_x * pitch_g, load)
    pitch_s = odd_units(advance_x * (columns - 1) + round_up(patch_x, load), load)
    block_channels = channels * channel_groups
    words = rows * pitch_rows + slots * block_channels * problem.phases_x * pitch_s
    line = channel_groups * rows * (lanes * positions + load)
    shared_bytes = max(buffers * words, line) * word_bytes

    # Registers; the compiler holds no more operands than there is room for.
    source_columns = problem.phases_x * (advance_x * (columns - 1) + patch_x)
    source_copies = copies_of_thread(block_channels, source_columns, problem.vector, threads)
    g_copies = copies_of_thread(
        patch_x, problem.phases_x * columns, problem.upstream_vector, threads // rows
    )
    across = -(-source_columns // (problem.vector * threads)) + -(
        -problem.phases_x * columns // (problem.upstream_vector * (threads // rows))
    )
    staged_source = 0 if problem.asynchronous else source_copies * problem.vector
    staged_g = 0 if problem.upstream_asynchronous else g_copies * problem.upstream_vector
    staged = (slots * staged_source + staged_g) * word_bytes // 4
    sums = channels * positions * (2 if problem.l1 else 1)
    values = SUM_OFFSETS * sums + HELD_OFFSETS * min(MOST_HELD, patch_x * positions)
    offsets = GRADIENT_OFFSETS + SOURCE_OFFSETS * source_copies + COLUMN_OFFSETS * across
    offsets += FIRST_OFFSETS * (which == 1)
    registers = ceil(values * word_bytes / 4 + offsets)
    ahead = some_asynchronous or registers + staged <= MOST_REGISTERS
    registers = max(registers, registers - (0 if ahead else HELD_OPERANDS) + staged)
    if registers > MOST_REGISTERS or shared_bytes > device.shared_bytes or slots > MOST_SLOTS:
        return None

    displacements = displacements_of_thread(patch_x, load)
    source = round_up(advance_x * (positions - 1) + displacements, load)
    g_loads = patch_x * positions // load
    source_loads = channels * -(-patch_x // displacements) * source // load
    copying = patch_y * (g_copies * GRADIENT_COPY + staged_g * GRADIENT_WORD) + source_rows * (
        source_copies * GRADIENT_COPY + staged_source * GRADIENT_WORD
    )
    step_y, step_x = problem.step
    bytes_moved = (
        bytes_of_rows(patch_y * rows * patch_x, problem.phases_x * columns, problem.upstream_bytes)
        + bytes_of_rows(block_channels * source_rows, source_columns, problem.element_bytes, step_x)
        + bytes_of_rows(
            block_channels * rows * step_y,
            problem.phases_x * columns * step_x,
            problem.element_bytes,
        )
    )
    # Results leave in passes, of which each has as many channels of a thread as fit.
    passes = -(-channels // min(channels, shared_bytes // (line * word_bytes)))
    pixels = problem.phases_x * columns * step_x + step_x - 1
    places = rows * -(-pixels // problem.result_vector)
    sharers = max(1, threads // places)  # threads that serve a place
    storing = GRADIENT_STORE + GRADIENT_RESULT * problem.result_vector + ZEROS * (step_y - 1)
    storing = passes * GRADIENT_PLACE + -(-block_channels // sharers) * storing
    terms = patch_y * threads * channels * positions * patch_x
    wavefronts_g, wavefronts_source = _gradient_wavefronts(
        groups, rows, min(channel_groups, 32 // rows), problem.phases_x, problem.advance, patch_y,
        (pitch_g, pitch_rows, pitch_s), _bank(block_channels * problem.phases_x * pitch_s, load),
        load,
    )  # fmt: skip
    block = Block(
        threads,
        registers,
        shared_bytes,
        rounds=patch_y,
        multiply_adds=terms * (ADDITIONS if problem.l1 else 1),
        wavefronts=threads
        / 32
        * (
            patch_y * (wavefronts_g * g_loads + wavefronts_source * source_loads)
            + 2 * channels * positions * word_bytes / 4
        ),
        instructions=patch_y * threads * (g_loads + source_loads + STEP + slots * SLOT)
        + threads * (copying + -(-places * sharers // threads) * storing + GRADIENT_ONCE)
        + threads * (g_copies * G_PLACE + sums * SUM)
        + threads * (source_copies * SOURCE_PLACE[which] + slots * SLOT_PLACE[which])
        + terms * (COMPARISONS if problem.l1 else 0),
        words=patch_y * rows * patch_x * problem.phases_x * columns
        + source_rows * block_channels * source_columns,
        bytes=bytes_moved,
        ahead=ahead,
    )
    blocks = problem.samples * -(-problem.rows // rows) * -(-problem.columns // columns)
    blocks *= -(-problem.channels // block_channels)
    constants = {
        "positions": positions, "channels": channels, "displacements": displacements,
        "groups": groups, "rows": rows, "channel_groups": channel_groups,
        "vector": problem.vector, "upstream_vector": problem.upstream_vector,
        "pitch_g": pitch_g, "pitch_rows": pitch_rows, "pitch_s": pitch_s,
        "asynchronous": problem.asynchronous,
        "upstream_asynchronous": problem.upstream_asynchronous,
        "ahead": ahead, "buffers": buffers, "threads": threads,
        "shared_words": shared_bytes // word_bytes,
    }  # fmt: skip
    tile = GradientTile(
        tuple(constants.items()), positions, groups, rows, channels, channel_groups, threads,
        shared_bytes,
    )  # fmt: skip
    return cycles_in_rounds(block, blocks, problem.accumulator, device), tile
