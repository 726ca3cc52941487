"""Run the ``cupycorr`` command, in this process or in one of its own."""

import subprocess
import sys

from click.testing import CliRunner
from cupycorr.cli import main


def invoke(*words):
    """Run the command in this process."""
    outcome = CliRunner().invoke(main, [str(word) for word in words])
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome


def installed(*words, **kwargs):
    """Run the command in a process of its own, with pipes."""
    code = "from cupycorr.cli import main\nmain(prog_name='cupycorr')"
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, **kwargs
    )
