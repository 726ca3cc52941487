"""The ``cupycorr`` command.

Modules of this package import one another relatively: in a checkout they lie beside the package
cupycorr, and inside it once installed.
"""

from __future__ import annotations

import click

import cupycorr

from .bench import bench
from .convert import convert
from .gradcheck import gradcheck
from .match import match
from .warmup import warmup

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.version_option(cupycorr.__version__, prog_name="cupycorr")
def main() -> None:
    """Measure and check the correlation layer on this machine, and match images by it."""


main.add_command(bench)
main.add_command(convert)
main.add_command(gradcheck)
main.add_command(match)
main.add_command(warmup)
