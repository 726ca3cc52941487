"""Count what the tiled kernels do, and predict how long it takes them.

What a plan fixes (tiles, blocks, accesses to memory) is counted exactly; registers and instructions
are read off the machine code; times are those of the model that kernels/README.md describes.
"""

from __future__ import annotations

from functools import cache
from math import ceil, prod
from typing import NamedTuple

import nvrtc
from devices import DEVICES, LAYERS

from cupycorr.cuda import sources as cuda_sources
from cupycorr.cuda.cost import (
    SECTOR_BYTES,
    Block,
    busy_cycles,
    bytes_of_rows,
    cycles_in_rounds,
    resident,
    wavefronts,
)
from cupycorr.cuda.launch import Launch
from cupycorr.cuda.plan import plan
from cupycorr.cuda.tiles import ADDITIONS, SEARCH_ROW, ZERO
from cupycorr.layer import Layer

WORD = 4  # bytes of a float32
BYTES = {"float": 4, "double": 8, "Half": 2, "Bfloat16": 2}  # of types, by their names in kernels
DRAM_SHARE = 0.85  # of the data sheet's bandwidth that a kernel reaches


class Figures(NamedTuple):
    """Of a GPU, from its data sheet."""

    gigahertz: float
    dram: float
    """Gigabytes per second."""


FIGURES = {
    "2070S": Figures(1.77, 448),
    "A100": Figures(1.41, 1555),
    "4090": Figures(2.52, 1008),
    "H100": Figures(1.755, 3350),
    "5090": Figures(2.41, 1792),
}


class Counts(NamedTuple):
    """What a block of a tiled kernel does, all of its rounds together."""

    rounds: int
    """How often it fills its buffers."""
    useful: int
    """Multiply-adds."""
    executed: int
    """Multiply-adds that idle lanes of working warps count in."""
    loads: int
    """16-byte loads of shared memory, of warps."""
    wavefronts: int
    """Of these loads."""
    staged: int
    """Words copied to shared memory."""
    results: int
    """Words stored to global memory."""
    bytes: float
    """Read from global memory and written to it, in whole sectors."""


# ---- what a plan fixes


class Tile:
    """The constants of a tiled launch, as attributes, and what product.cu derives from them."""

    def __init__(self, launch: Launch):
        vars(self).update(launch.constants)
        self.is_product = launch.source == "product.cu"
        self.load = 16 // BYTES[self.accumulator]  # words of a 16-byte access
        self.lead = getattr(self, "lead", 0)
        self.lanes = self.phases_x * self.groups
        self.columns = self.groups * self.positions
        self.source_columns = self.lead + self.advance_x * (self.columns - 1) + self.patch_x
        self.thread_columns = self.lead + self.advance_x * (self.positions - 1) + self.displacements
        self.q_groups = ceil(self.patch_x / self.displacements)
        self.trips, self.served = self._stores()
        self.trimmed = self.is_product and self.least < self.patch_y
        self.empty = 0.0  # strips that a block fills with zeros, beside its own
        if self.trimmed:
            sizes = dict(launch.sizes)
            rows = sizes["lattice_height"] / self.phases_y
            every = rows * self.patch_y * self.q_groups
            self.empty = max(0.0, every / sizes["blocks_y"] - self.strips)

    def _stores(self):
        """Return how results leave, between two barriers.

        How often a thread goes through the loop over places, and how often it stores at each.
        """
        line = self.lanes * self.positions + self.load
        if self.is_product:
            at_once, of_thread = self.channel_groups * self.strips * line, self.displacements
            rows, lines, pixels = self.strips, 1, self.lanes * self.positions
        else:
            at_once, of_thread = self.channel_groups * self.rows * line, self.channels
            rows, lines = self.rows, self.channel_groups
            pixels = self.lanes * self.positions * self.step_x + self.step_x - 1
        slices = min(of_thread, self.shared_words // at_once)
        if self.is_product:
            slices = ceil(of_thread / ceil(of_thread / slices))
        places = rows * ceil(pixels / self.result_vector)
        sharers = max(1, self.threads // places)
        return ceil(places * sharers / self.threads), ceil(slices * lines / sharers)

    def warps(self, address):
        """Return, for every warp, the address of each lane."""
        lanes = [address(thread) for thread in range(self.threads)]
        return [lanes[i : i + 32] for i in range(0, self.threads, 32)]


def _sum_of_wavefronts(tile, address, loads):
    """Return the loads and wavefronts of warps that load ``loads`` times at such addresses."""
    working = [warp for warp in tile.warps(address) if any(lane is not None for lane in warp)]
    units = [[None if word is None else word // tile.load for word in warp] for warp in working]
    return [loads * len(working), loads * sum(map(wavefronts, units))]


def _add(*rows):
    return [sum(column) for column in zip(*rows, strict=True)]


def _product_accesses(tile, block_y):
    """Return loads and wavefronts of one channel of each channel group, in product.cu."""
    row_strips = tile.patch_y * tile.q_groups
    strip0 = block_y * tile.strips
    row0 = strip0 // row_strips
    p0 = strip0 % row_strips // tile.q_groups if tile.rows1 == 1 else 0
    words1 = tile.rows1 * tile.phases_x * tile.pitch1
    channel_words = words1 + tile.rows2 * tile.phases_x * tile.pitch2

    def place(thread):
        channel_group, rest = divmod(thread, tile.lanes * tile.strips)
        if channel_group >= tile.channel_groups:
            return None
        phase, group = divmod(rest % tile.lanes, tile.groups)
        row, rest = divmod(strip0 + rest // tile.lanes, row_strips)
        p, q_group = divmod(rest, tile.q_groups)
        base = channel_group * channel_words
        at1 = ((row - row0) * tile.phases_x + phase) * tile.pitch1 + group * tile.positions
        row2 = tile.advance_y * (row - row0) + p - p0
        at2 = (
            (row2 * tile.phases_x + phase) * tile.pitch2
            + tile.advance_x * tile.positions * group
            + tile.displacements * q_group
        )
        return base + at1, base + words1 + at2

    def address(which):
        return lambda thread: None if place(thread) is None else place(thread)[which]

    return _add(
        _sum_of_wavefronts(tile, address(0), tile.positions // tile.load),
        _sum_of_wavefronts(tile, address(1), ceil(tile.thread_columns / tile.load)),
    )


def _gradient_accesses(tile, step):
    """Return loads and wavefronts of one step of product_adjoint.cu."""
    block_channels = tile.channels * tile.channel_groups
    g_words = tile.rows * tile.pitch_rows
    source_words = block_channels * tile.phases_x * tile.pitch_s

    def parts(thread):
        rest, row = divmod(thread, tile.rows)
        lane, channel_group = divmod(rest, tile.channel_groups)
        return row, channel_group, *divmod(lane, tile.groups)

    def slot(row):
        source_row = tile.advance_y * row + (step - tile.advance_y * row) % tile.patch_y
        return source_row // tile.patch_y

    def g(thread):
        row, _, phase, group = parts(thread)
        if phase >= tile.phases_x:
            return None
        return row * tile.pitch_rows + phase * tile.pitch_g + group * tile.positions

    def source(thread):
        row, channel_group, phase, group = parts(thread)
        if phase >= tile.phases_x:
            return None
        return (
            g_words
            + (channel_group * tile.phases_x + phase) * tile.pitch_s
            + tile.advance_x * tile.positions * group
            + slot(row) * source_words
        )

    span = tile.advance_x * (tile.positions - 1) + tile.patch_x
    loads = [
        sum(1 for k in range(0, tile.thread_columns, tile.load) if e0 + k < span)
        for e0 in range(0, tile.patch_x, tile.displacements)
    ]
    return _add(
        _sum_of_wavefronts(tile, g, tile.patch_x * tile.positions // tile.load),
        _sum_of_wavefronts(tile, source, tile.channels * sum(loads)),
    )


def counts(launch: Launch, channels: int) -> Counts:
    """Count what a block does for maps of so many channels."""
    tile = Tile(launch)
    sums = tile.positions * (tile.displacements if tile.is_product else tile.channels)
    if tile.is_product:
        rounds = ceil(channels / tile.chunk)
        busy = tile.lanes * tile.strips
        blocks_y = dict(launch.sizes)["blocks_y"]
        some = [_product_accesses(tile, block) for block in range(min(blocks_y, 6))]
        accesses = [
            sum(one) * channels / tile.channel_groups / len(some) for one in zip(*some, strict=True)
        ]
        useful = channels * busy * tile.positions * tile.patch_x // tile.q_groups
        warps = ceil(busy * tile.channel_groups / 32)
        executed = channels // tile.channel_groups * warps * 32 * sums
        # Where strips are left out, a block amid the map has fewer rows than there is room for.
        across = ceil((tile.strips - 1) / (tile.patch_y * tile.q_groups)) + 1
        rows1 = min(tile.rows1, across) if tile.trimmed else tile.rows1
        staged = channels * tile.phases_x * (
            rows1 * tile.columns + tile.rows2 * tile.source_columns
        )  # fmt: skip
        results = busy * tile.positions * tile.patch_x // tile.q_groups
        moved = _bytes(
            tile, (busy // tile.lanes + tile.empty) * tile.displacements, 1, tile.result
        ) + channels * sum(
            bytes_of_rows(rows, tile.phases_x * columns, BYTES[tile.element], tile.step_x)
            for rows, columns in ((rows1, tile.columns), (tile.rows2, tile.source_columns))
        )
    else:
        rounds = tile.patch_y
        busy = tile.lanes * tile.rows * tile.channel_groups
        wraps = tile.advance_y * (tile.rows - 1)
        # From step `wraps` on no row has wrapped around, and the steps are all alike.
        differing = min(wraps, tile.patch_y - 1)
        alike = tile.patch_y - differing
        accesses = _add(
            *(_gradient_accesses(tile, step) for step in range(differing)),
            [alike * count for count in _gradient_accesses(tile, differing)],
        )
        useful = rounds * busy * sums * tile.patch_x
        executed = rounds * ceil(busy / 32) * 32 * sums * tile.patch_x
        block_channels = tile.channels * tile.channel_groups
        staged = tile.phases_x * (
            rounds * tile.rows * tile.patch_x * tile.columns
            + (rounds + wraps) * block_channels * tile.source_columns
        )
        results = busy * sums
        moved = (
            _bytes(tile, rounds * tile.rows * tile.patch_x, 1, tile.upstream)
            + bytes_of_rows(
                block_channels * (rounds + wraps),
                tile.phases_x * tile.source_columns,
                BYTES[tile.element],
                tile.step_x,
            )
            + _bytes(tile, block_channels * tile.rows * tile.step_y, tile.step_x, tile.element)
        )
    return Counts(rounds, useful, executed, *map(round, accesses), staged, results, moved)


def _bytes(tile, rows, step, kind):
    """Return the bytes that move with rows of a block's positions, each ``step`` pixels wide."""
    return bytes_of_rows(rows, tile.phases_x * tile.columns * step, BYTES[kind])


@cache
def touched(layer: str) -> dict[str, int]:
    """Return the bytes that a layer must move, of each array: whole sectors, once."""
    shape, geometry = LAYERS[layer]
    samples, channels, *size = shape
    cost = geometry.cost_shape(shape)
    volume = (*cost[:3], geometry.y.lattice_size(cost[3]), geometry.x.lattice_size(cost[4]))
    found = {"cost": prod(cost) * WORD, "volume": prod(volume) * WORD}
    for name in ("fmap1", "fmap2"):
        rows, columns = (
            _pixels(axis, positions, end, name)
            for axis, positions, end in zip((geometry.y, geometry.x), volume[3:], size, strict=True)
        )
        sectors = {column * WORD // SECTOR_BYTES for column in columns}
        found[name] = samples * channels * len(rows) * len(sectors) * SECTOR_BYTES
    found["map"] = prod(shape) * WORD
    return found


def _pixels(axis, positions, size, name):
    """Return the pixels of an axis that are read."""
    shifts = [0]
    if name == "fmap2":
        shifts = [axis.first_displacement + p * axis.dilation_patch for p in range(axis.patch_size)]
    pixels = {
        i * axis.lattice_step - axis.padding + shift for i in range(positions) for shift in shifts
    }
    return {pixel for pixel in pixels if 0 <= pixel < size}


# ---- floors


class Floor(NamedTuple):
    """The least time of a layer's pass, in microseconds."""

    arithmetic: float
    memory: float
    bytes: int
    """That it moves if it moves each tensor once."""


def products(layer: str) -> int:
    """Return a layer's multiply-adds: of all displacements, outside of the maps too."""
    return touched(layer)["volume"] // WORD * LAYERS[layer][0][1]


def floor(layer: str, gpu: str, gradients: int) -> Floor:
    """Return the floor of the forward pass (0 gradients), or of so many gradients."""
    device, figures, arrays = DEVICES[gpu], FIGURES[gpu], touched(layer)
    rate = device.multiprocessors * device.multiply_adds * figures.gigahertz * 1e3
    moved = arrays["cost"] + arrays["fmap1"] + (gradients != 1) * arrays["fmap2"]
    moved += gradients * arrays["map"]
    arithmetic = max(1, gradients) * products(layer) / rate
    return Floor(arithmetic, moved / (figures.dram * 1e3), moved)


# ---- what the compiler made, and how long that takes


class Machine(NamedTuple):
    """Of a kernel's machine code."""

    registers: int
    share: float
    """Of multiply-adds, or additions, among the instructions of the innermost loop."""
    instructions: int
    """That a thread issues, if all that its block needs is inside the image."""


def machine(launch: Launch, channels: int, capability: int) -> Machine:
    """Compile a tiled launch and read its loops."""
    kernel = nvrtc.compile_kernel(_marked(launch), launch.kernel, capability)
    tile = Tile(launch)
    work, rounds = _work(tile), counts(launch, channels).rounds
    inner, outer = nvrtc.loops(kernel, work, (RARE,))
    instructions = nvrtc.straight(kernel, (RARE,)) + outer.total() * (rounds - 1)
    instructions += _repeated_stores(tile, nvrtc.store_loops(kernel, (RARE,)))
    if tile.trimmed:
        rows = dict(launch.sizes)["lattice_height"] / tile.phases_y
        places = tile.empty * tile.displacements * tile.lanes * tile.positions / tile.result_vector
        instructions += round(ZERO * places / launch.threads + SEARCH_ROW * rows / 2)
    if tile.is_product and inner is not outer:  # the inner loop is over channels
        instructions += inner.total() * (ceil(channels / tile.channel_groups) - rounds)
    if not tile.is_product:
        source_rows = tile.advance_y * (tile.rows - 1) + tile.patch_y
        unused = -source_rows % tile.patch_y  # steps that fetch a source row less
        _, shorter = nvrtc.loops(kernel, work, (RARE, LAST_SLOT))
        instructions -= unused * (outer.total() - shorter.total())
    return Machine(kernel.registers, work(inner) / inner.total(), instructions)


def _repeated_stores(tile, loops):
    """Return the instructions that loops over stores add to those of going through them once."""
    stores = tile.served * (1 if tile.is_product else tile.step_y)  # of a thread at a place
    added = 0
    for of_places, of_stores in loops:
        if not of_places["STG"]:  # but for marks
            continue
        if of_stores is not None:  # several stores at once, and some behind them one by one
            beside = stores - of_places["STG"]
            added += tile.trips * beside * of_stores.total() / of_stores["STG"]
        if of_stores is not None or tile.is_product or tile.trips > 1:
            added += (tile.trips - 1) * of_places.total()
    # A loop over places that runs once is none in machine code; then those over stores are here.
    if not tile.is_product and tile.trips == 1 and all(inner is None for _, inner in loops):
        longest = max((loop for loop, _ in loops), key=lambda loop: loop["STG"], default=None)
        if longest is not None and longest["STG"] < stores:
            added += stores / longest["STG"] * longest.total()
            added -= sum(loop.total() for loop, _ in loops)
    return round(added)


# Marks of what only borders and sums that are not finite need, and of a gradient's last slot.
RARE, LAST_SLOT = 0, 1
MARKS = {
    "product.cu": (
        ("store(k, to + k * cost_plane, false);", "{{{rare} {text}}}"),
        ("const int k = i / units, v =", "{rare} {text}"),  # what is zeroed is counted by itself
    ),
    "product_adjoint.cu": (
        ("share_g.trim(thread % row_threads", "{rare} {text}"),
        ("if (step_y == 1 || t > 0) continue;", "{text} {rare}"),
        ("fetched |= 1u << slot;", "{text} if (slot > 0 && slot == slots - 1) {last}"),
        ("if (fetched >> slot & 1) {", "{text} if (slot > 0 && slot == slots - 1) {last}"),
    ),
}


def _marked(launch: Launch) -> str:
    """Return a launch's source with marks."""
    source = cuda_sources.source(launch)
    for text, form in MARKS[launch.source]:
        assert source.count(text) == 1, f"the kernel has no {text}"
        with_marks = form.format(text=text, rare=nvrtc.mark(RARE), last=nvrtc.mark(LAST_SLOT))
        source = source.replace(text, with_marks)
    return source


def _work(tile):
    return nvrtc.additions if tile.l1 else nvrtc.multiply_adds


# The units of a multiprocessor, each with what the others do.
UNITS = {
    "arithmetic": ("wavefronts", "words", "instructions", "bytes"),
    "shared memory": ("multiply_adds", "instructions", "bytes"),
    "issue": ("wavefronts", "words", "bytes"),
    "level 2": ("multiply_adds", "instructions", "wavefronts", "words"),
}


class Prediction(NamedTuple):
    """The time of a launch, in microseconds, and what decides it."""

    resident: int
    """Blocks on a multiprocessor at a time."""
    microseconds: float
    bound: str


def predict(launch: Launch, count: Counts, code: Machine, gpu: str, memory: float) -> Prediction:
    """Predict a launch's time; ``memory`` is its floor."""
    device, figures, tile = DEVICES[gpu], FIGURES[gpu], Tile(launch)
    operations = count.executed * (ADDITIONS if tile.l1 else 1)
    accumulator = "float64" if tile.accumulator == "double" else "float32"
    written = count.results / 8 / tile.load
    block = Block(
        launch.threads,
        code.registers,
        launch.shared_bytes,
        count.rounds,
        multiply_adds=operations,
        wavefronts=count.wavefronts + 2 * written,
        instructions=code.instructions * launch.threads - operations,
        words=count.staged,
        bytes=count.bytes,
        ahead=tile.ahead,
    )
    cycles = cycles_in_rounds(block, launch.blocks, accumulator, device)
    busy = {
        name: busy_cycles(block._replace(**dict.fromkeys(others, 0)), accumulator, device)
        for name, others in UNITS.items()
    }
    times = {
        max(busy, key=busy.__getitem__): cycles / figures.gigahertz / 1e3,
        "memory": memory / DRAM_SHARE,
    }
    bound = max(times, key=times.__getitem__)
    return Prediction(resident(block, device), times[bound], bound)


# ---- layers: their launches, the bytes that those move, and their time

PASSES = {"forward": 0, "gradients": 2}  # number of gradients
RESULTS = {"forward": ("cost",), "gradients": ("grad_fmap1", "grad_fmap2")}


def launches(layer: str, gpu: str, which: str) -> list[Launch]:
    """Return the launches of a pass, in float32."""
    shape, geometry = LAYERS[layer]
    return list(plan(RESULTS[which], Layer(geometry), shape, "float32", DEVICES[gpu]).launches)


def is_tiled(launch: Launch) -> bool:
    """Tell whether a launch is of a product kernel."""
    return launch.source in ("product.cu", "product_adjoint.cu")


def used(launch: Launch) -> list[str]:
    """Return the arrays that a launch reads or writes: a gradient of products not its own map."""
    own = launch.arrays[-1].removeprefix("grad_")
    of_products = own.startswith("fmap") and not dict(launch.constants)["l1"]
    return [name for name in launch.arrays if not (of_products and name == own)]


def moved(layer: str, which: str) -> int:
    """Return the bytes that a pass moves if every launch moves each of its arrays once."""
    arrays = touched(layer)
    arrays |= {
        "grad_cost": arrays["cost"],
        "grad_fmap1": arrays["map"],
        "grad_fmap2": arrays["map"],
    }
    return sum(arrays[name] for launch in launches(layer, "H100", which) for name in used(launch))


@cache
def microseconds(layer: str, gpu: str, which: str) -> float:
    """Predict the time of a pass; compiles its tiled kernels."""
    least, arrays = floor(layer, gpu, min(1, PASSES[which])).memory, touched(layer)
    time = 0.0
    for launch in launches(layer, gpu, which):
        if is_tiled(launch):
            code = machine(launch, LAYERS[layer][0][1], DEVICES[gpu].capability)
            count = counts(launch, LAYERS[layer][0][1])
            time += predict(launch, count, code, gpu, least).microseconds
        else:  # sums over the taps, bound by memory
            rate = FIGURES[gpu].dram * 1e3 * DRAM_SHARE
            time += (arrays["cost"] + arrays["volume"]) / rate
    return time
