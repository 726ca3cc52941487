"""A progress bar for commands that take their time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(name: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Show a progress bar on standard error if that is a terminal, and nothing otherwise.

    Without a total it shows that work goes on. Yields what is called with the amount done since the
    last call, and with what it was done for if that is to be shown.
    """
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total)

        def advance(amount: int, what: str = "") -> None:
            progress.update(task, advance=amount, description=f"{name}: {what}" if what else name)

        yield advance
