"""``cupycorr bench``: how long the cost volume and its gradients take."""

from __future__ import annotations

import contextlib
from functools import partial
from itertools import groupby, islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from click.core import ParameterSource

import cupycorr

from .. import cuda, environment, progress
from ..options import (
    DTYPES,
    SIZE,
    LookupProblem,
    Problem,
    Sizes,
    Sweep,
    described,
    device_argument,
    engine_option,
    layout_option,
    problem_options,
    refuse_engines,
    sweep_option,
)
from ..presets import PRESETS, chosen_problems, preset_option
from . import features, floors, lookups, measure, memory, report, show, trial
from .compare import compare
from .peers import ITEMSIZE, PEERS, missing

AnyProblem = Problem | LookupProblem
Pair = tuple[features.Image, features.Image]
Own = measure.Implementation | lookups.Implementation


class _Command(click.Command):
    """The command ``bench``, of which ``compare`` and ``show`` in place of a device are others."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> click.Context:
        for other in (compare, show.show):
            if args[:1] == [other.name]:
                return other.make_context(f"{info_name} {other.name}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command(cls=_Command, short_help="Measure the time of forward and backward.")
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
    help="Runs per implementation; if it is not given, at most so many: an implementation stops "
    "when its medians are steady to 1 %.",
)
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Stop an implementation early after so much time, but not before 3 runs.",
)
@preset_option
@sweep_option
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
@click.option(
    "--flow",
    type=click.Choice(["smooth", "rough"]),
    help="Where lookups look.  [default: smooth, or with --images the flow between them]",
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
    type=click.Choice([*dict.fromkeys((*PEERS, *lookups.PEERS)), "all"]),
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
@click.option(
    "--markdown",
    "markdown_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Write a table for a page; with - instead of the tables.",
)
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Draw bars, curves of a sweep and a roofline: .svg, .png, .pdf; needs matplotlib.",
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
    sweep: Sweep | None,
    images: tuple[str, str] | None,
    downscale: int,
    flow: str | None,
    engines: tuple[str, ...],
    against: tuple[str, ...],
    threads: int | None,
    cold: bool,
    json_file: Path | None,
    markdown_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure forward and backward, on random maps or on those of two images.

    Backward is timed on its own and computes both gradients. After a first call, and before the
    runs, results are compared with those of cupycorr on NumPy arrays, to the bit, on maps of -1, 0
    and 1; what differs is reported and not timed. All implementations run in turns, on as many
    threads. On cuda the device's own time counts, by events on the current stream.

    --radius R, or a preset of RAFT's, measures the flow-guided lookup: what is prepared once for a
    pair of maps (levels, or another's volume of all pairs), and each lookup. Its results are held
    to the bound of round-off, as those of others depend on their way to a coordinate.

    `bench compare A.json B.json` tells what became slower between two runs.

    Exits with 1 if cupycorr itself fails, with 2 if the options are wrong or something is missing,
    and with 130 if it is interrupted; what is measured until then is shown and written.
    """
    unit = scale if _is_given("scale") else None
    until_steady = not _is_given("runs")
    refuse_engines(device, engines)
    _refuse_options(device, threads, cold)
    if device == "cuda":
        with progress.bar("looking for CUDA", None):
            environment.require_cuda()
    written = {"--json": json_file, "--markdown": markdown_file, "--plot": plot_file}
    outputs = {option: path for option, path in written.items() if path is not None}
    show.refuse(outputs, images or ())
    at_once = {} if json_file in (None, show.STANDARD_OUTPUT) else {"--json": outputs["--json"]}
    quiet = show.STANDARD_OUTPUT in outputs.values()
    kind = DTYPES[dtype]
    problems = chosen_problems(sizes, presets, channels_last, sweep)
    kinds = {isinstance(problem, LookupProblem) for problem in problems}
    _refuse_peers(against, kinds)
    candidates = {
        is_lookup: _implementations(device, engines, against, kind, sizes.similarity, is_lookup)
        for is_lookup in kinds
    }
    if images is not None and sweep is not None and sweep.name in ("height", "width", SIZE):
        raise click.UsageError(f"--sweep {sweep.name} is not for --images, which have sizes")
    pair = None if images is None else features.load_pair(*images)
    setting = _Setting(device, kind, pair, downscale, flow)
    if pair is not None:
        problems = [_on_images(problem, pair, downscale, sizes) for problem in problems]
    groups = [list(some) for _, some in groupby(problems, _together)]
    for group in groups:
        needed = sum(_needed_bytes(problem, kind) for problem in group)
        environment.require_memory(described(*group), needed)
        if device == "cuda":
            cuda.refuse_too_large(group, ITEMSIZE[kind], cold)
    count = environment.usable_cores() if threads is None else threads
    torch_too = any(one.library == "torch" for some, _ in candidates.values() for one in some)
    with contextlib.ExitStack() as stack:
        with progress.bar("getting ready", None):
            stack.enter_context(measure.threads(count, torch_too))
            document: dict[str, Any] = {
                "schema": report.SCHEMA,
                "cupycorr": cupycorr.__version__,
                "machine": environment.machine(),
                "device": device,
                "dtype": kind,
                "runs": runs,
                "until_steady": until_steady,
                "max_seconds": max_seconds,
                "input": "random" if images is None else {"images": images, "downscale": downscale},
                "warnings": [],
                "problems": [],
            }
            if True in kinds:
                document["flow"] = flow or ("smooth" if images is None else "matched")
            if device == "cuda":
                document |= {"cuda": cuda.device(), "cold": cold}
                stopwatch: measure.Stopwatch = cuda.Stopwatch(cold)
            else:
                rates = floors.core_rates()
                document |= {"threads": count, "core": rates}
                document["warnings"] = floors.warnings(document["machine"], rates)
                stopwatch = measure.by_clock
        if not quiet:
            report.heading(document)
        try:
            for group in groups:
                if device == "cuda":
                    memory.release()
                cases = [
                    _case(problem, candidates[isinstance(problem, LookupProblem)], setting)
                    for problem in group
                ]
                jobs = [job for case in cases for job in (*case.jobs, *case.bounds)]
                name = group[0].name.partition(",")[0]
                with progress.bar(name, len(jobs) * (runs + 1)) as advance:
                    outcomes = iter(measure.compare(
                        jobs, runs=runs, max_seconds=max_seconds, until_steady=until_steady,
                        advance=partial(advance, 1), stopwatch=stopwatch, device=device,
                    ))  # fmt: skip
                for case in cases:
                    compared = [*islice(outcomes, len(case.jobs)), *case.left_out]
                    bounds = list(islice(outcomes, len(case.bounds)))
                    entry = report.entry(case.problem, kind, compared, bounds)
                    if device == "cuda":
                        entry["kernels"] = case.kernels
                    document["problems"].append(entry)
                    if not quiet:
                        report.show(document, entry, scale, unit)
                # Now, so that nothing that ends the process loses what is measured.
                show.write(document, at_once)
        finally:
            if document["problems"]:
                show.write(document, {o: path for o, path in outputs.items() if o not in at_once})
    if report.own_failure(document):
        raise click.exceptions.Exit(1)


def _is_given(option: str) -> bool:
    source = click.get_current_context().get_parameter_source(option)
    return source is ParameterSource.COMMANDLINE


def _refuse_options(device: str, threads: int | None, cold: bool) -> None:
    """Refuse options that say nothing about a device."""
    if device == "cuda" and threads is not None:
        raise click.UsageError("--threads is for cpu, got cuda")
    if device == "cpu" and cold:
        raise click.UsageError("--cold is for cuda, got cpu")


def _refuse_peers(against: tuple[str, ...], kinds: set[bool]) -> None:
    """Refuse others that compute none of what is measured."""
    tables = {False: PEERS, True: lookups.PEERS}
    known = {name for is_lookup in kinds for name in tables[is_lookup]}
    for name in against:
        if name != "all" and name not in known:
            kind = "the cost volume" if name in PEERS else "the lookup: --radius"
            raise click.UsageError(f"--against {name} is for {kind}")


def _together(problem: AnyProblem) -> str:
    """Return what is equal for problems that are measured in turns: those of a sweep."""
    return problem.name if problem.swept is None else problem.name.partition(",")[0]


def _needed_bytes(problem: AnyProblem, dtype: str) -> int:
    """Return the memory of a problem that is measured."""
    # At most at once: two libraries' maps, gradients and results, and the float originals.
    numbers = 6 * prod(problem.shape) + 3 * prod(problem.cost_shape)
    needed = numbers * (ITEMSIZE[dtype] + max(4, ITEMSIZE[dtype]))
    if isinstance(problem, LookupProblem):
        # Results in float64, and their bounds, are kept beside them.
        needed += 8 * (9 * prod(problem.shape) + 3 * prod(problem.cost_shape))
    return needed + floors.needed_bytes(problem, dtype)


class _Setting(NamedTuple):
    """What all problems share."""

    device: str
    dtype: str
    pair: Pair | None
    downscale: int
    flow: str | None


class _Case(NamedTuple):
    """A problem with all that is timed of it."""

    problem: AnyProblem
    jobs: list[measure.Job]
    bounds: list[measure.Job]
    left_out: list[measure.Outcome]
    kernels: list[dict[str, Any]]


def _case(
    problem: AnyProblem, candidates: tuple[list[Own], list[measure.Outcome]], setting: _Setting
) -> _Case:
    """Give what is measured its arrays."""
    device, dtype, pair, downscale, flow = setting
    maps = (
        measure.random_maps(problem.shape, dtype)
        if pair is None
        else _image_maps(problem, pair, downscale)
    )
    able, unable = _split(candidates[0], problem, dtype, device)
    tiled = any(one.name in ("cupycorr cupy", "cupycorr torch") for one in able)
    kernels = _kernels(problem, dtype) if device == "cuda" and tiled else []
    if isinstance(problem, LookupProblem):
        field = (
            lookups.flow(problem, flow or "smooth")
            if pair is None or flow is not None
            else lookups.image_flow(problem, pair, downscale)
        )
        coords = lookups.coordinates(problem, field)
        some = [one for one in able if isinstance(one, lookups.Implementation)]
        jobs = lookups.jobs(some, problem, maps, coords, dtype, device)
    else:
        others = [one for one in able if isinstance(one, measure.Implementation)]
        jobs = measure.jobs(others, problem, maps, dtype, device)
    bounds = floors.jobs(problem, dtype, device)
    return _Case(problem, jobs, bounds, [*unable, *candidates[1]], kernels)


def _kernels(problem: AnyProblem, dtype: str) -> list[dict[str, Any]]:
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
    is_lookup: bool = False,
) -> tuple[list[Own], list[measure.Outcome]]:
    """Return what can be measured here, and why the rest of what was asked for cannot.

    Raises
    ------
    environment.Unavailable
        If something that was asked for by name is missing.
    """
    candidates: list[tuple[Own, bool, str | None]]
    own: Any = lookups.ours if is_lookup else measure.ours
    no_bfloat16 = (
        "bfloat16 needs ml_dtypes, not installed"
        if dtype == "bfloat16" and not environment.has("ml_dtypes")
        else None
    )
    if device == "cuda":
        no_torch = None if environment.torch_finds_cuda() else "needs a torch that finds the GPU"
        own = lookups.ours if is_lookup else cuda.implementation
        candidates = [(own(name), name in engines or name == "cupy", obstacle)
                      for name, obstacle in (("cupy", no_bfloat16), ("plain", no_bfloat16),
                                             ("torch", no_torch))
                      if name in (engines or ("cupy", "torch"))]  # fmt: skip
    else:
        no_torch = None if environment.has("torch") else "needs torch, not installed"
        candidates = [(own(name), name in engines, obstacle)
                      for name, obstacle in (("numpy", no_bfloat16), ("torch", no_torch))
                      if name in engines or not engines]  # fmt: skip
    candidates += [
        (
            lookups.IMPLEMENTATIONS[name]
            if is_lookup
            else measure.Implementation(name, "torch", peer.correlate),
            name in against,
            missing(peer, similarity, device),
        )
        for name, peer in (lookups.PEERS if is_lookup else PEERS).items()
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
    implementations: list[Own], problem: AnyProblem, dtype: str, device: str
) -> tuple[list[Own], list[measure.Outcome]]:
    """Separate what covers this problem from what does not."""
    able, unable = [], []
    is_lookup = isinstance(problem, LookupProblem)
    what = problem.lookup if isinstance(problem, LookupProblem) else problem.layer.geometry
    for one in implementations:
        peer = (lookups.PEERS if is_lookup else PEERS).get(one.name)
        obstacle = peer and peer.unable(problem.shape, what, dtype, device)
        if obstacle:
            unable.append(measure.Outcome(one.name, "skipped", obstacle))
            continue
        if peer and peer.module != "torch":
            outcome = trial.of(one.name, problem, dtype, device)
            if outcome.status != "timed":
                unable.append(outcome)
                continue
        able.append(one)
    return able, unable


def _on_images(problem: AnyProblem, images: Pair, downscale: int, sizes: Sizes) -> AnyProblem:
    """Give a problem the size of the images' feature maps."""
    height, width = (size // downscale for size in images[0].shape)
    batch = problem.shape[0] if "batch_size" in sizes.given else 1
    shape = (batch, problem.shape[1], height, width)
    try:
        if isinstance(problem, LookupProblem):
            problem.lookup.level_sizes(height, width)
        else:
            problem.layer.geometry.cost_shape(shape)
    except ValueError as error:
        raise click.UsageError(f"{problem.name}: {error}") from None
    return problem._replace(shape=shape)


def _image_maps(
    problem: AnyProblem, images: Pair, downscale: int
) -> tuple[measure.Array, measure.Array]:
    """Return the feature maps of the images, as often as the batch is large."""
    one, two = features.feature_maps(*images, problem.shape[1], downscale)
    batch = problem.shape[0]
    return np.repeat(one, batch, 0), np.repeat(two, batch, 0)
