"""What ``cupycorr bench`` writes into files, and ``bench show``, which makes it of a document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from .. import files
from . import plot, report
from .compare import complete, other_schema, read

STANDARD_OUTPUT = Path("-")


@click.command(short_help="Make a table and a picture of a document.")
@click.argument("document", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--markdown", type=click.Path(path_type=Path), help="Write a table; -: print it.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw it: svg, pdf, png.")
def show(document: Path, markdown: Path | None, picture: Path | None) -> None:
    """Make of a document of --json what --markdown and --plot would have written.

    Exits with 2 if the document is of another schema, or the options are wrong.
    """
    found = {"--markdown": markdown, "--plot": picture}
    outputs = {option: path for option, path in found.items() if path is not None}
    refuse(outputs, (str(document),))
    measured = read(document)
    if text := other_schema(measured, document):
        raise click.UsageError(text)
    with complete():
        write(measured, outputs or {"--markdown": STANDARD_OUTPUT})


def refuse(outputs: dict[str, Path], inputs: tuple[str, ...]) -> None:
    """Refuse files that cannot be written before time is spent on them."""
    paths = [path for path in outputs.values() if path != STANDARD_OUTPUT]
    if len(outputs) > len(paths) + 1:
        raise click.UsageError("of --json and --markdown only one can be -")
    options = [option for option, path in outputs.items() if path != STANDARD_OUTPUT]
    files.refuse(" and ".join(options), paths, inputs)
    if "--plot" in outputs:
        plot.require(outputs["--plot"])


def write(document: dict[str, Any], outputs: dict[str, Path]) -> None:
    """Write what the options ask for."""
    for option, path in outputs.items():
        if option == "--plot":
            content = plot.picture(document, path.suffix.lstrip("."))
        else:
            text = report.markdown(document) if option == "--markdown" else _json(document)
            content = f"{text}\n".encode()
        if path == STANDARD_OUTPUT:
            click.echo(content.decode(), nl=False)
        else:
            files.write(path, content)


def _json(document: dict[str, Any]) -> str:
    """Return the document's text, with each list of numbers in one line."""
    text = json.dumps(document, indent=1)
    return re.sub(r"\[\n([^][{}\"]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
