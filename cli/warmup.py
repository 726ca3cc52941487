"""``cupycorr warmup``: compile the CUDA kernels of layers and lookups before they are needed."""

from __future__ import annotations

import click

from . import cuda, environment
from .options import DTYPES, Sizes, description, layout_option, problem_options
from .presets import PRESETS, chosen_problems, preset_option


@click.command(short_help="Compile the CUDA kernels of a layer.")
@problem_options(PRESETS["default"])
@click.option(
    "-d",
    "--dtype",
    "dtypes",
    multiple=True,
    default=["float"],
    show_default=True,
    type=click.Choice([*DTYPES, "all"]),
    help="What is computed in; repeatable.",
)
@click.option("--tf32", is_flag=True, help="Compile those of float that may round to TF32.")
@layout_option
@preset_option
def warmup(
    sizes: Sizes,
    dtypes: tuple[str, ...],
    tf32: bool,
    channels_last: bool,
    presets: tuple[str, ...],
) -> None:
    """Compile the kernels that forward and backward need, for the current CUDA device.

    CuPy keeps them on disk (in ~/.cupy/kernel_cache, or where CUPY_CACHE_DIR says), so that the
    first call of a later process need not compile. Images of about the same size, to four binary
    digits, share kernels. Prints for each kernel the seconds that it took, the registers of a
    thread, and the bytes of registers that did not fit and were spilled to memory. --radius R, or a
    preset of RAFT's, compiles those of the flow-guided lookup, by calls on zeros of its sizes.

    Exits with 1 if a kernel does not compile, and with 2 if the options are wrong or something is
    missing.
    """
    environment.require_cuda()
    problems = chosen_problems(sizes, presets, channels_last)
    click.echo(cuda.line(cuda.device()))
    names = list(DTYPES) if "all" in dtypes else list(dict.fromkeys(dtypes))
    for problem in problems:
        click.echo(f"\n{problem.name}: maps {problem.shape}, {description(problem)}")
        click.echo(f"{'kernel':<28}  {'seconds':>7}  {'registers':>9}  {'spilled bytes':>13}")
        for dtype in (DTYPES[name] for name in names):
            try:
                kernels = cuda.kernels(problem, dtype, tf32 and dtype == "float32")
            except RuntimeError as error:
                raise click.ClickException(f"{problem.name}, {dtype}: {error}") from None
            for one in kernels:
                click.echo(
                    f"{dtype + ' ' + one['kernel']:<28}  {one['seconds']:>7.3f}  "
                    f"{one['registers']:>9}  {one['local_bytes']:>13}"
                )
