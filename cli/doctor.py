"""``cupycorr doctor``: what is installed here, which engines work, and why the others do not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

import cupycorr
from cupycorr import Geometry
from cupycorr.layer import Layer
from cupycorr.lookup import Lookup

from . import environment
from .environment import Finding
from .gradcheck import checks
from .options import ENGINES, LookupProblem, Problem

PROBLEMS = (
    Problem("cost volume", (1, 32, 48, 64), Layer(Geometry(patch_size=9))),
    LookupProblem("lookup", (1, 32, 24, 32), Lookup(radius=3, levels=2)),
)
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "float16")}
"""What engines are checked in; 16 bits have kernels of their own."""
VARIABLES = (
    "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "CUPY_CACHE_DIR", "CUPY_CACHE_IN_MEMORY",
    "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS",
)  # fmt: skip
"""Those that decide which device, kernels or threads are used."""


@click.command(short_help="Say what works here, for a bug report.")
def doctor() -> None:
    """Say what is installed here, which engines work, and why the others do not.

    Every engine that is there computes a small cost volume and a small lookup, with their
    gradients, and is compared with the definition. On a GPU that takes longer the first time, when
    kernels are compiled. A bug report should contain all that this prints.

    Exits with 0 if the CPU and CUDA can be used, with 2 if only the CPU can, and with 1 if an
    engine that is there does not compute what it should.
    """
    _describe_machine()
    click.echo("\nCPU")
    right = _check("cpu", environment.has("torch"))
    click.echo("\nCUDA")
    findings = environment.cuda_findings()
    for finding in findings:
        click.echo(finding)
    usable = all(finding.found for finding in findings)
    if usable:
        for device in _devices():
            click.echo(f"          {device}")
        right &= _check("cuda", _torch_finds_cuda())
        click.echo(f"          compiled kernels: {_cache()}")
    if not right:
        click.echo("\nSomething does not compute what it should.")
        raise click.exceptions.Exit(1)
    click.echo(f"\nThe CPU can be used, CUDA {'too' if usable else 'cannot'}.")
    if not usable:
        raise click.exceptions.Exit(2)


def _describe_machine() -> None:
    found = environment.machine()
    load = "" if found["load"] is None else f", load {found['load']:.1f}"
    memory = environment.available_memory() / 1e9
    settings = (f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    click.echo(
        f"cupycorr {cupycorr.__version__} in {Path(cupycorr.__file__).parent}\n"
        f"Python {found['python']}, {found['system']}\n"
        f"{found['processor']}, {found['cores']} cores{load}, {memory:.1f} GB of memory free\n"
        f"{environment.versions(found)}\n"
        f"BLAS: {', '.join(found['blas']) or 'unknown'}\n"
        f"Environment: {', '.join(settings) or 'nothing of interest is set'}"
    )


def _check(device: str, with_torch: bool) -> bool:
    """Check the engines of a device, and print how each did; return whether all are right."""
    right = True
    for name in ENGINES[device]:
        if name == "torch" and not with_torch:
            where = "not installed" if device == "cpu" else "finds no GPU"
            click.echo(f"  none    torch: {where}")
            continue
        start = time.perf_counter()
        wrong = _wrong(name, device)
        detail = wrong or f"right, in {time.perf_counter() - start:.1f} s"
        click.echo(Finding(name, wrong is None, detail))
        right &= wrong is None
    return right


def _wrong(name: str, device: str) -> str | None:
    """Return what an engine does not compute as it should, or why it does not compute."""
    for dtype in DTYPES[device]:
        for problem in PROBLEMS:
            try:
                for check, _ in checks(name, device, problem, dtype):
                    if check.error is not None:
                        return f"{problem.name}, {dtype}, {check.name}: {check.error}"
            except Exception as error:  # a broken library raises what it likes
                text = " ".join(str(error).split())
                return f"{problem.name}, {dtype}: {type(error).__name__}: {text}"
    return None


def _torch_finds_cuda() -> bool:
    try:
        return environment.torch_finds_cuda()
    except Exception:  # a broken torch, about which the line of the CPU has told
        return False


def _devices() -> list[str]:
    """Describe the CUDA devices and their limits."""
    import cupy

    from cupycorr.cuda import engine

    lines = []
    for number in range(cupy.cuda.runtime.getDeviceCount()):
        with cupy.cuda.Device(number) as current:
            free, memory = current.mem_info
            limits = engine.device_of(number)
            lines.append(
                f"device {number}: sm_{limits.capability}, {limits.multiprocessors} "
                f"multiprocessors, {limits.shared_bytes >> 10} KiB of shared memory per block, "
                f"{free / 1e9:.1f} of {memory / 1e9:.1f} GB free"
            )
    return lines


def _cache() -> str:
    """Describe the folder in which CuPy keeps compiled kernels."""
    from cupycorr.cuda import engine

    folder = Path(engine.cache_folder())
    sizes = [one.stat().st_size for one in folder.glob("*") if one.is_file()]
    return f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB in {folder}"
