"""``cupycorr gradcheck``: whether the cost volume and its gradients are right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import click

from cupycorr import verify, verify_lookup
from cupycorr.api import correlate
from cupycorr.layer import DTYPES
from cupycorr.sampling import correlation_lookup

from . import cuda, environment
from .options import (
    ENGINES,
    LookupProblem,
    Problem,
    Sizes,
    described,
    description,
    device_argument,
    engine_option,
    problem_options,
    refuse_engines,
)

# The defaults of spatial-correlation-sampler's grad_check.py.
DEFAULTS = {
    "batch_size": 2,
    "kernel_size": 3,
    "patch": 3,
    "patch_dilation": 2,
    "channel": 2,
    "height": 10,
    "width": 10,
    "stride": 2,
    "pad": 1,
    "dilation": 2,
}
# Above this, numerical differentiation entry by entry takes minutes; torch's fast mode then
# compares one random projection of the Jacobian.
MOST_ENTRIES = 4000
NO_BFLOAT16 = "bfloat16 with NumPy's or CuPy's arrays needs ml_dtypes: pip install ml_dtypes"


@click.command(short_help="Check the cost volume and its gradients.")
@device_argument
@problem_options(DEFAULTS, flags={"dilation": "-d"})
@engine_option(
    "What is checked, repeatable: numpy or torch on cpu; cupy, plain (its plain kernels) or torch "
    "on cuda.  [default: all that is there]"
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    default=["float64"],
    show_default=True,
    type=click.Choice([*DTYPES, "all"]),
    help="What is computed in, all: what is there; repeatable.",
)
def gradcheck(device: str, sizes: Sizes, engines: tuple[str, ...], dtypes: tuple[str, ...]) -> None:
    """Check the cost volume and its gradients, forward and backward.

    Every engine is compared with the definition, evaluated one tap and one displacement at a
    time: exactly on small integers, and within the bound of round-off on random maps. The adjoint
    identity <cost, g> = <fmap1, grad_fmap1> = <fmap2, grad_fmap2> needs no comparison; of absolute
    differences the latter two add up to the former. In float64 torch's own gradcheck and
    gradgradcheck follow, which compare with finite differences.

    --radius R checks the flow-guided lookup in place of the cost volume: at coordinates inside and
    outside of the maps, with the gradients by the maps and the coordinates.

    Exits with 1 if a check fails or a kernel does not compile, and with 2 if the options are wrong
    or something is missing.
    """
    refuse_engines(device, engines)
    if device == "cuda":
        environment.require_cuda()
    problem = sizes.problem("geometry")
    names = _engines(device, engines)
    every = tuple(DTYPES)
    chosen = every if "all" in dtypes else tuple(d for d in every if d in dtypes)
    no_bfloat16 = not environment.has("ml_dtypes") and set(names) - {"torch"}
    if no_bfloat16 and "bfloat16" in dtypes:
        raise environment.Unavailable(NO_BFLOAT16)
    maps, cost = math.prod(problem.shape), math.prod(problem.cost_shape)
    # At most at once, in float64: maps, their copies, gradients twice, and results.
    environment.require_memory(described(problem), 8 * (10 * maps + 4 * cost))
    if device == "cuda":
        click.echo(cuda.line(cuda.device()))
    click.echo(f"maps {problem.shape}, {description(problem)}")
    outcomes = []
    for name in names:
        for dtype in chosen:
            if no_bfloat16 and dtype == "bfloat16" and name != "torch":
                click.echo(f"left out  {name} {dtype}: {NO_BFLOAT16}")
                continue
            for check, against in checks(name, device, problem, dtype):
                verdict, colour = ("ok    ", "green") if check.error is None else ("FAILED", "red")
                what = f"{name} {dtype}: {check.name} ({against})"
                error = f": {check.error}" if check.error else ""
                click.echo(f"{click.style(verdict, fg=colour)}  {what}{error}")
                outcomes.append(check.error is None)
    failed = outcomes.count(False)
    click.echo(f"{len(outcomes) - failed} passed, {failed} failed")
    if failed:
        raise click.exceptions.Exit(1)


def _engines(device: str, asked: tuple[str, ...]) -> list[str]:
    torch = environment.has("torch") if device == "cpu" else environment.torch_finds_cuda()
    present = [name for name in ENGINES[device] if name != "torch" or torch]
    if "torch" in asked and "torch" not in present:
        what = "torch" if device == "cpu" else "a torch that finds the GPU"
        raise environment.Unavailable(f"the torch engine needs {what}: pip install torch")
    return [name for name in present if name in asked or not asked]


def _engine(module: Any, name: str, device: str) -> Any:
    """Return an engine as `verify` or `verify_lookup` check it."""
    if name == "torch":
        return module.torch_engine(device)
    if name == "numpy":
        return module.numpy_engine()
    return module.cupy_engine(plain=name == "plain")


def checks(
    name: str, device: str, problem: Problem | LookupProblem, dtype: str
) -> Iterator[tuple[verify.Check, str]]:
    """Yield each check of one engine, and what it compares with."""
    is_lookup = isinstance(problem, LookupProblem)
    module: Any = verify_lookup if is_lookup else verify
    what = problem.lookup if isinstance(problem, LookupProblem) else problem.layer
    engine, oracle = _engine(module, name, device), module.definition()
    try:
        for check in module.check(engine, problem.shape, what, dtype, oracle=oracle):
            alone = check.name.startswith("adjoint identity")
            yield check, "with itself" if alone else "with the definition"
    except RuntimeError as failure:
        if device == "cpu":
            raise
        # CUDA cannot be used as it is, or the device refuses or stops a kernel.
        yield verify.Check("kernels", " ".join(str(failure).split())), "on the device"
    if name == "torch" and dtype == "float64":
        yield from _torch_checks(device, problem)


def _torch_checks(
    device: str, problem: Problem | LookupProblem
) -> Iterator[tuple[verify.Check, str]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(problem.shape, dtype=torch.float64, generator=generator) for _ in range(2)]
    if isinstance(problem, LookupProblem):
        # Odd sixteenths are no integers on any level: there costs have no derivative.
        samples, _, height, width = problem.shape
        steps = torch.randint(-3, max(height, width) + 3, (samples, 2, height, width, 2),
                              generator=generator)  # fmt: skip
        maps.append(steps[..., 0].double() + (steps[..., 1] % 8 * 2 + 1) / 16)
    inputs = [one.to(device).requires_grad_() for one in maps]
    outputs = math.prod(problem.cost_shape)
    fast = sum(one.numel() for one in inputs) + outputs > MOST_ENTRIES
    against = "with finite differences" + (", one random projection" if fast else "")

    def cost(fmap1: torch.Tensor, fmap2: torch.Tensor, *coords: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor
        if isinstance(problem, LookupProblem):
            where = coords[0] if coords else inputs[2].detach()
            result = correlation_lookup(fmap1, fmap2, where, problem.lookup)
        else:
            result = correlate(fmap1, fmap2, problem.layer)
        return result

    # The lookup has second derivatives by its maps alone.
    for run, operands in (
        (torch.autograd.gradcheck, inputs),
        (torch.autograd.gradgradcheck, inputs[:2]),
    ):
        try:
            run(cost, tuple(operands), fast_mode=fast)
            error = None
        except RuntimeError as failure:  # GradcheckError, or an engine that has no gradient
            error = " ".join(str(failure).split())
        yield verify.Check(f"torch.autograd.{run.__name__}", error), against
