"""Write the tables of kernels/README.md: what the kernels cost, counted.

    python tests/support/kernel_tables.py            write them into the page
    python tests/support/kernel_tables.py --print    print them

Compiling takes minutes where nothing is kept from before.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from math import ceil
from multiprocessing import get_context
from pathlib import Path

from devices import DEVICES, LAYERS
from kernel_costs import (
    DRAM_SHARE,
    FIGURES,
    WORD,
    Machine,
    Tile,
    counts,
    floor,
    machine,
    predict,
    products,
    touched,
)

from cupycorr.cuda import plan as cuda_plan
from cupycorr.cuda.plan import Launch
from cupycorr.layer import Layer

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"
TABLED = [layer for layer in LAYERS if layer != "stride 3"]
# Of a pass's time by the floor of arithmetic (FlowNetC), and of its bytes (default).
TARGETS = {"forward": 2.0, "gradients": 2.5, "bytes": 1.3}
PASSES = {"forward": 0, "gradients": 2}  # number of gradients


def launches(layer: str, gpu: str, which: str, similarity: str = "product") -> list[Launch]:
    """Return the launches of a pass."""
    shape, geometry = LAYERS[layer]
    results = ("cost",) if which == "forward" else ("grad_fmap1", "grad_fmap2")
    layer = Layer(geometry, similarity)
    return list(cuda_plan.plan(results, layer, shape, "float32", DEVICES[gpu]).launches)


def used(launch: Launch) -> list[str]:
    """Return the arrays that a launch reads or writes: a gradient of products not its own map."""
    own = launch.arrays[-1].removeprefix("grad_")
    of_products = own.startswith("fmap") and not dict(launch.constants)["l1"]
    return [name for name in launch.arrays if not (of_products and name == own)]


def _is_tiled(launch):
    return launch.source in ("product.cu", "product_adjoint.cu")


# ---- tables that need no compiler


def _tile_text(launch):
    tile = Tile(launch)
    if tile.is_product:
        displacements = min(tile.displacements, tile.patch_x)
        return (
            f"{tile.positions} x {displacements}",
            f"{tile.lanes} x {tile.strips} x {tile.channel_groups}",
            f"{tile.chunk}",
        )
    return (
        f"{tile.positions} x {tile.channels}",
        f"{tile.lanes} x {tile.rows} x {tile.channel_groups}",
        "",
    )


def tile_table(which: str) -> list[list[str]]:
    """Return the table of the tiles of a pass, of the first gradient if it is of gradients."""
    head = (
        "layer, GPU, thread, block, chunk, blocks, fill, threads, KiB, work, strict, merged, bytes"
    )
    rows = [head.split(", ")]
    for layer in TABLED:
        for gpu in FIGURES:
            launch = next(filter(_is_tiled, launches(layer, gpu, which)))
            count = counts(launch, LAYERS[layer][0][1])
            multiprocessors = DEVICES[gpu].multiprocessors
            fill = launch.blocks / (ceil(launch.blocks / multiprocessors) * multiprocessors)
            rows.append([
                layer, gpu, *_tile_text(launch), f"{launch.blocks}", f"{fill:.2f}",
                f"{launch.threads}", f"{launch.shared_bytes / 1024:.0f}",
                f"{count.useful * launch.blocks / products(layer):.2f}",
                f"{32 * count.strict / count.executed:.2f}",
                f"{32 * count.merged / count.executed:.2f}",
                f"{(count.staged + count.results) * WORD / count.useful:.2f}",
            ])  # fmt: skip
    if which == "gradients":
        rows = [[*row[:4], *row[5:]] for row in rows]
    return rows


def moved(layer: str, which: str) -> int:
    """Return the bytes that a pass moves if every launch moves each of its arrays once."""
    arrays = touched(layer)
    arrays |= {
        "grad_cost": arrays["cost"],
        "grad_fmap1": arrays["map"],
        "grad_fmap2": arrays["map"],
    }
    return sum(arrays[name] for launch in launches(layer, "H100", which) for name in used(launch))


def bytes_table() -> list[list[str]]:
    """Return the table of the bytes of each pass."""
    rows = [["layer", "pass", "each tensor once, MB", "all launches, MB", "ratio"]]
    for layer in TABLED:
        for which, gradients in PASSES.items():
            least = floor(layer, "H100", gradients).bytes / 1e6
            most = moved(layer, which) / 1e6
            rows.append([layer, which, f"{least:.1f}", f"{most:.1f}", f"{most / least:.2f}"])
    return rows


# ---- tables of what is compiled


@cache
def machines(
    layers: tuple[str, ...], similarity: str = "product"
) -> dict[tuple[str, str, str], Machine]:
    """Compile the tiled launches of layers; keys are layer, GPU and what a launch writes."""
    jobs = [
        (layer, gpu, launch)
        for layer in layers
        for gpu in FIGURES
        for which in PASSES
        for launch in filter(_is_tiled, launches(layer, gpu, which, similarity))
    ]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = pool.map(_compiled, jobs)
        return {
            (layer, gpu, launch.arrays[-1]): code
            for (layer, gpu, launch), code in zip(jobs, found, strict=True)
        }


def _compiled(job):
    layer, gpu, launch = job
    return machine(launch, LAYERS[layer][0][1], DEVICES[gpu].capability)


def _predictions(layer, gpu, which):
    """Return a launch, its machine code and its prediction, for all tiled launches of a pass."""
    least = floor(layer, gpu, min(1, PASSES[which])).memory
    for launch in filter(_is_tiled, launches(layer, gpu, which)):
        code = machines(tuple(TABLED))[layer, gpu, launch.arrays[-1]]
        count = counts(launch, LAYERS[layer][0][1])
        yield launch, code, predict(launch, count, code, gpu, least)


def code_table(which: str) -> list[list[str]]:
    """Return the table of the compiled kernels of a pass."""
    rows = [["layer", "GPU", "registers", "resident", "FFMA", "us", "bound by"]]
    for layer in TABLED:
        for gpu in FIGURES:
            parts = list(_predictions(layer, gpu, which))
            bounds = dict.fromkeys(part.bound for _, _, part in parts)
            rows.append([
                layer, gpu,
                " / ".join(f"{code.registers}" for _, code, _ in parts),
                " / ".join(f"{part.resident}" for _, _, part in parts),
                " / ".join(f"{code.share:.0%}" for _, code, _ in parts),
                " / ".join(f"{part.microseconds:.1f}" for _, _, part in parts),
                ", ".join(bounds),
            ])  # fmt: skip
    return rows


def differences_table() -> list[list[str]]:
    """Return the table of what absolute differences take beside products, for FlowNetC."""
    head = "GPU, pass, thread, block, registers, instructions, us, products, bound by"
    rows, layer = [head.split(", ")], "FlowNetC"
    channels = LAYERS[layer][0][1]
    for gpu in FIGURES:
        for which, gradients in PASSES.items():
            least = floor(layer, gpu, min(1, gradients)).memory
            codes, per_term, times, bounds = [], [], [], {}
            planned = launches(layer, gpu, which, "l1")
            for launch in planned:
                code = machines((layer,), "l1")[layer, gpu, launch.arrays[-1]]
                count = counts(launch, channels)
                part = predict(launch, count, code, gpu, least)
                codes.append(f"{code.registers}")
                per_term.append(f"{code.instructions * launch.threads / count.executed:.1f}")
                times.append(part.microseconds)
                bounds[part.bound] = None
            products = sum(part.microseconds for *_, part in _predictions(layer, gpu, which))
            rows.append([
                gpu, which, *_tile_text(planned[0])[:2], " / ".join(codes), " / ".join(per_term),
                f"{sum(times):.1f}", f"{sum(times) / products:.1f}x", ", ".join(bounds),
            ])  # fmt: skip
    return rows


def _window_microseconds(layer: str, gpu: str, which: str) -> float:
    """Return the microseconds of summing windows, or spreading to them: bound by memory."""
    windows = [one for one in launches(layer, gpu, which) if not _is_tiled(one)]
    arrays = touched(layer)
    return len(windows) * (arrays["cost"] + arrays["volume"]) / (
        FIGURES[gpu].dram * 1e3 * DRAM_SHARE
    )  # fmt: skip


def summary_table(which: str) -> list[list[str]]:
    """Return the predicted time of a pass over its floors, for every layer and GPU."""
    rows = [["layer", *FIGURES]]
    for layer in TABLED:
        row = [layer]
        for gpu in FIGURES:
            least = floor(layer, gpu, PASSES[which])
            time = sum(part.microseconds for _, _, part in _predictions(layer, gpu, which))
            time += _window_microseconds(layer, gpu, which)
            floors = [f"{least.arithmetic:.1f}", f"{least.memory:.1f}"]
            decides = least.memory > least.arithmetic
            floors[decides] = f"**{floors[decides]}**"
            row.append(f"{time:.1f} ({' / '.join(floors)}), {time / max(least[:2]):.2f}x")
        rows.append(row)
    return rows


def targets_table() -> list[list[str]]:
    """Return which targets are met."""
    rows = [["target", "limit", "predicted", ""]]
    for which, gradients in PASSES.items():
        for gpu in FIGURES:
            if gpu == "5090":
                continue
            parts = _predictions("FlowNetC", gpu, which)
            time = sum(part.microseconds for _, _, part in parts)
            ratio = time / floor("FlowNetC", gpu, gradients).arithmetic
            rows.append(_target(f"FlowNetC, {which}, {gpu}: time / FMA floor", which, ratio))
    for which, gradients in PASSES.items():
        ratio = moved("default", which) / floor("default", "H100", gradients).bytes
        rows.append(_target(f"default, {which}: bytes / each tensor once", "bytes", ratio))
    return rows


def _target(text, limit, ratio):
    met = "met" if ratio <= TARGETS[limit] else "**missed**"
    return [text, f"{TARGETS[limit]}", f"{ratio:.2f}", met]


# ---- the page

PLAIN = {
    "tiles forward": lambda: tile_table("forward"),
    "tiles gradients": lambda: tile_table("gradients"),
    "bytes": bytes_table,
}
COMPILED = {
    "targets": targets_table,
    "times forward": lambda: summary_table("forward"),
    "times gradients": lambda: summary_table("gradients"),
    "code forward": lambda: code_table("forward"),
    "code gradients": lambda: code_table("gradients"),
    "l1": differences_table,
}


def text(rows: list[list[str]]) -> str:
    """Return a table as Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def table(page: str, name: str) -> re.Match[str]:
    """Find a table between its markers."""
    found = re.search(rf"(?<=<!-- {name} -->\n)[^!]*?(?=\n<!-- end -->)", page)
    if found is None:
        raise ValueError(f"{README} must hold the markers of the table {name!r}")
    return found


def main() -> None:
    tables = {name: text(make()) for name, make in {**PLAIN, **COMPILED}.items()}
    if "--print" in sys.argv:
        print("\n\n".join(f"{name}\n{made}" for name, made in tables.items()))
        return
    page = README.read_text(encoding="utf-8")
    for name, made in tables.items():
        place = table(page, name)
        page = page[: place.start()] + made + page[place.end() :]
    README.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
