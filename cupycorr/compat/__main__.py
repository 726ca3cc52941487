"""Run a program that imports another system's package, with cupycorr in its place.

    python -m cupycorr.compat NAME[=SYSTEM] ... -- program.py [arguments of the program]
    python -m cupycorr.compat NAME[=SYSTEM] ... -- -m package.module [arguments of the program]

NAME is what the program imports, SYSTEM the module of `cupycorr.compat` that it is to find there:
nvidia for instance, or raft. See `cupycorr.compat.stand_in_for`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import NoReturn

from cupycorr import compat
from cupycorr.compat.stand_in import stand_in_for

SYSTEMS = sorted({*compat.__all__} - {"StandIn", "stand_in_for"})


def main(words: list[str]) -> None:
    """Stand in for the modules named before ``--``, and run the program named behind it."""
    if "--" not in words[1:-1]:
        sys.exit((__doc__ or "").rstrip())
    split = words.index("--")
    for word in words[:split]:
        name, _, system = word.partition("=")
        if system and system not in SYSTEMS:
            _fail(f"SYSTEM must be one of {', '.join(SYSTEMS)}, got {system}")
        try:
            stand_in_for(name, getattr(compat, system) if system else None)
        except ValueError as error:
            _fail(str(error))
    program, *arguments = words[split + 1 :]
    safe = getattr(sys.flags, "safe_path", False)
    # As Python itself does for a program, unless it is told to leave the path alone.
    if program == "-m":
        if not arguments:
            _fail("-m must be followed by the name of a module")
        module, sys.argv = arguments[0], arguments
        if not safe:
            sys.path[0] = str(Path.cwd())
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    path = Path(program).resolve()
    if not path.exists():
        _fail(f"there is no program {program}")
    sys.argv = [str(path), *arguments]
    if not safe:
        sys.path[0] = str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


def _fail(message: str) -> NoReturn:
    print(f"python -m cupycorr.compat: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
