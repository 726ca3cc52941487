"""The ``cupycorr`` command.

Modules of this package import one another relatively: in a checkout they lie beside the package
cupycorr, and inside it once installed.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Any

import click

import cupycorr

from .bench import bench
from .convert import convert
from .doctor import doctor
from .gradcheck import gradcheck
from .match import match
from .warmup import warmup

CUDA_MODULES = ("cupy.", "cupy_backends.", "cupycorr.cuda.")
"""Where the exceptions of compiler, driver and runtime are defined, and the CUDA engine's own."""
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {' '.join(str(message).split())}", err=True)


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A name or a sign that the terminal's encoding lacks must not end a command.
                stream.reconfigure(errors="replace")
        if os.environ.get("NO_COLOR"):
            ctx.color = False
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            raise click.exceptions.Exit(130) from None
        except Exception as error:
            if not type(error).__module__.startswith(CUDA_MODULES):
                raise
            raise click.ClickException(" ".join(str(error).split())) from error


@click.group(cls=_Commands, context_settings=CONTEXT)
@click.version_option(cupycorr.__version__, prog_name="cupycorr")
def main() -> None:
    """Measure and check the correlation layer on this machine, and match images by it."""


main.add_command(bench)
main.add_command(convert)
main.add_command(doctor)
main.add_command(gradcheck)
main.add_command(match)
main.add_command(warmup)
