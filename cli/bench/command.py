"""``cupycorr bench``: how long the cost volume and its gradients take."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource

import cupycorr

from .. import cuda, environment, files, progress
from ..options import (
    DTYPES,
    Problem,
    Sizes,
    described,
    device_argument,
    engine_option,
    layout_option,
    problem_options,
    refuse_engines,
)
from ..presets import PRESETS, chosen_problems, preset_option
from . import features, measure, memory, report
from .peers import ITEMSIZE, PEERS, missing

STANDARD_OUTPUT = Path("-")


@click.command(short_help="Measure the time of forward and backward.")
@device_argument
@problem_options(PRESETS["default"])
@click.option("-d", "--dtype", type=click.Choice(list(DTYPES)), default="float", show_default=True)
@layout_option
@click.option(
    "--scale",
    type=click.Choice(list(report.SCALES)),
    default="us",
    show_default=True,
    help="Unit of the times; if it is not given, each table has the unit that suits it.",
)
@click.option(
    "-r",
    "--runs",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Runs per implementation.",
)
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Stop an implementation early after so much time, but not before 3 runs.",
)
@preset_option
@click.option(
    "--images",
    nargs=2,
    type=click.Path(exists=True, dir_okay=False),
    metavar="A B",
    help="Filter two image files into feature maps, and measure on these; one pair unless -b is "
    "given.",
)
@click.option(
    "--downscale",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Pixels of the images per position of the feature maps.",
)
@engine_option(
    "What cupycorr computes on, repeatable: arrays of numpy on cpu, of cupy on cuda, or tensors of "
    "torch; plain: arrays of cupy by the plain kernels alone.  [default: all that is there, but "
    "not plain]"
)
@click.option(
    "--against",
    "against",
    multiple=True,
    type=click.Choice([*PEERS, "all"]),
    help="Another implementation to measure in turns with cupycorr; repeatable.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of every implementation on cpu.  [default: the usable cores]",
)
@click.option("--cold", is_flag=True, help="On cuda, empty the L2 cache before each run.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Write parameters, machine and the seconds of every run; with - instead of the tables.",
)
def bench(
    device: str,
    sizes: Sizes,
    dtype: str,
    channels_last: bool,
    scale: str,
    runs: int,
    max_seconds: float,
    presets: tuple[str, ...],
    images: tuple[str, str] | None,
    downscale: int,
    engines: tuple[str, ...],
    against: tuple[str, ...],
    threads: int | None,
    cold: bool,
    json_file: Path | None,
) -> None:
    """Measure forward and backward, on random maps or on those of two images.

    Backward is timed on its own and computes both gradients. Before anything is timed, its
    results are compared with those of cupycorr on NumPy arrays, to the bit, on maps of -1, 0 and
    1; what differs is reported and not timed. All implementations run in turns, on as many threads.
    On cuda the device's own time counts, by events on the current stream.

    Exits with 1 if cupycorr itself fails, with 2 if the options are wrong or something is missing,
    and with 130 if it is interrupted; what is measured until then is shown and written.
    """
    source = click.get_current_context().get_parameter_source("scale")
    unit = scale if source is ParameterSource.COMMANDLINE else None
    refuse_engines(device, engines)
    _refuse_options(device, threads, cold)
    if device == "cuda":
        with progress.bar("looking for CUDA", None):
            environment.require_cuda()
    if json_file is not None and json_file != STANDARD_OUTPUT:
        files.refuse("--json", [json_file], inputs=images or ())
    kind = DTYPES[dtype]
    problems = chosen_problems(sizes, presets, channels_last)
    implementations, absent = _implementations(device, engines, against, kind, sizes.similarity)
    pair = None if images is None else features.load_pair(*images)
    if pair is not None:
        problems = [_on_images(problem, pair, downscale, sizes) for problem in problems]
    for problem in problems:
        # At most at once: two libraries' maps, gradients and results, and the float originals.
        numbers = 6 * prod(problem.shape) + 3 * prod(problem.cost_shape)
        needed = numbers * (ITEMSIZE[kind] + max(4, ITEMSIZE[kind]))
        environment.require_memory(described(problem), needed)
        if device == "cuda":
            cuda.refuse_too_large(problem, ITEMSIZE[kind], cold)
    count = environment.usable_cores() if threads is None else threads
    torch_too = any(one.library == "torch" for one in implementations)
    with contextlib.ExitStack() as stack:
        with progress.bar("getting ready", None):
            stack.enter_context(measure.threads(count, torch_too))
            document: dict[str, Any] = {
                "cupycorr": cupycorr.__version__,
                "machine": environment.machine(),
                "device": device,
                "dtype": kind,
                "runs": runs,
                "max_seconds": max_seconds,
                "input": "random" if images is None else {"images": images, "downscale": downscale},
                "problems": [],
            }
            if device == "cuda":
                document |= {"cuda": cuda.device(), "cold": cold}
                stopwatch: measure.Stopwatch = cuda.Stopwatch(cold)
            else:
                gemm = {"size": measure.GEMM_SIZE, "seconds": measure.gemm_seconds(kind)}
                document |= {"threads": count, "gemm": gemm}
                stopwatch = measure.by_clock
        if json_file != STANDARD_OUTPUT:
            report.heading(document)
        try:
            for problem in problems:
                maps = (
                    measure.random_maps(problem.shape, kind)
                    if pair is None
                    else _image_maps(problem, pair, downscale)
                )
                if device == "cuda":
                    memory.release()
                able, unable = _split(implementations, problem, kind, device)
                tiled = any(one.name in ("cupycorr cupy", "cupycorr torch") for one in able)
                kernels = _kernels(problem, kind) if device == "cuda" and tiled else []
                with progress.bar(problem.name, len(able) * (runs + 1)) as advance:
                    outcomes = measure.compare(
                        able, problem, maps, kind, runs=runs, max_seconds=max_seconds,
                        advance=partial(advance, 1), stopwatch=stopwatch, device=device,
                    )  # fmt: skip
                entry = report.entry(problem, kind, [*outcomes, *unable, *absent])
                if device == "cuda":
                    entry["kernels"] = kernels
                elif report.exceeds_gemm(document, entry):
                    document["gemm"]["seconds"] += measure.gemm_seconds(kind)
                document["problems"].append(entry)
                if json_file is not None and json_file != STANDARD_OUTPUT:
                    # Now, so that nothing that ends the process loses what is measured.
                    files.write(json_file, _text(document).encode())
                if json_file != STANDARD_OUTPUT:
                    report.show(document, entry, scale, unit)
        finally:
            if json_file == STANDARD_OUTPUT and document["problems"]:
                click.echo(_text(document), nl=False)
    if report.own_failure(document):
        raise click.exceptions.Exit(1)


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1) + "\n"


def _refuse_options(device: str, threads: int | None, cold: bool) -> None:
    """Refuse options that say nothing about a device."""
    if device == "cuda" and threads is not None:
        raise click.UsageError("--threads is for cpu, got cuda")
    if device == "cpu" and cold:
        raise click.UsageError("--cold is for cuda, got cpu")


def _kernels(problem: Problem, dtype: str) -> list[dict[str, Any]]:
    try:
        return cuda.kernels(problem, dtype)
    except RuntimeError:
        return []  # what is wrong will be met again, and reported, when results are compared


def _implementations(
    device: str,
    engines: tuple[str, ...],
    against: tuple[str, ...],
    dtype: str,
    similarity: str,
) -> tuple[list[measure.Implementation], list[measure.Outcome]]:
    """Return what can be measured here, and why the rest of what was asked for cannot.

    Raises
    ------
    environment.Unavailable
        If something that was asked for by name is missing.
    """
    no_bfloat16 = (
        "bfloat16 needs ml_dtypes, not installed"
        if dtype == "bfloat16" and not environment.has("ml_dtypes")
        else None
    )
    if device == "cuda":
        no_torch = None if environment.torch_finds_cuda() else "needs a torch that finds the GPU"
        candidates = [(cuda.implementation(name), name in engines or name == "cupy", obstacle)
                      for name, obstacle in (("cupy", no_bfloat16), ("plain", no_bfloat16),
                                             ("torch", no_torch))
                      if name in (engines or ("cupy", "torch"))]  # fmt: skip
    else:
        no_torch = None if environment.has("torch") else "needs torch, not installed"
        candidates = [(measure.ours(name), name in engines, obstacle)
                      for name, obstacle in (("numpy", no_bfloat16), ("torch", no_torch))
                      if name in engines or not engines]  # fmt: skip
    candidates += [
        (
            measure.Implementation(name, "torch", peer.correlate),
            name in against,
            missing(peer, similarity, device),
        )
        for name, peer in PEERS.items()
        if name in against or "all" in against
    ]
    present, absent = [], []
    for one, asked, obstacle in candidates:
        if obstacle is None:
            present.append(one)
        elif asked:
            raise environment.Unavailable(f"{one.name} {obstacle}")
        elif one.name != "cupycorr torch":
            absent.append(measure.Outcome(one.name, "skipped", obstacle))
    return present, absent


def _split(
    implementations: list[measure.Implementation], problem: Problem, dtype: str, device: str
) -> tuple[list[measure.Implementation], list[measure.Outcome]]:
    """Separate what covers this problem from what does not."""
    able, unable = [], []
    for one in implementations:
        peer = PEERS.get(one.name)
        obstacle = peer and peer.obstacle(problem.shape, problem.layer.geometry, dtype, device)
        if obstacle:
            unable.append(measure.Outcome(one.name, "skipped", obstacle))
        else:
            able.append(one)
    return able, unable


Pair = tuple[features.Image, features.Image]


def _on_images(problem: Problem, images: Pair, downscale: int, sizes: Sizes) -> Problem:
    """Give a problem the size of the images' feature maps."""
    height, width = (size // downscale for size in images[0].shape)
    batch = problem.shape[0] if "batch_size" in sizes.given else 1
    shape = (batch, problem.shape[1], height, width)
    try:
        problem.layer.geometry.cost_shape(shape)
    except ValueError as error:
        raise click.UsageError(f"{problem.name}: {error}") from None
    return problem._replace(shape=shape)


def _image_maps(
    problem: Problem, images: Pair, downscale: int
) -> tuple[measure.Array, measure.Array]:
    """Return the feature maps of the images, as often as the batch is large."""
    one, two = features.feature_maps(*images, problem.shape[1], downscale)
    batch = problem.shape[0]
    return np.repeat(one, batch, 0), np.repeat(two, batch, 0)
