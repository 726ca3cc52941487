"""Run the ``cupycorr`` command, in this process or in one of its own."""

import inspect
import subprocess
import sys

from click.testing import CliRunner
from cupycorr.cli import main


def invoke(*words, **how):
    """Run the command in this process; how: as of CliRunner."""
    # Before click 8.2 both outputs were one, unless told.
    mixes = "mix_stderr" in inspect.signature(CliRunner).parameters
    runner = CliRunner(mix_stderr=False) if mixes else CliRunner()
    outcome = runner.invoke(main, [str(word) for word in words], **how)
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome


def installed(*words, **kwargs):
    """Run the command in a process of its own, with pipes."""
    code = "from cupycorr.cli import main\nmain(prog_name='cupycorr')"
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, **kwargs
    )
