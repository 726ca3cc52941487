"""Run a program that imports another system's package, with cupycorr in its place.

    python -m cupycorr.compat NAME[=SYSTEM] ... -- program.py [arguments of the program]

NAME is what the program imports, SYSTEM what it is to find there: caffe, mmcv, nvidia, sniklaus or
taichi. See `cupycorr.compat.stand_in_for`.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path

from cupycorr.compat.stand_in import stand_in_for


def main(words: list[str]) -> None:
    """Stand in for the modules named before ``--``, and run the program named behind it."""
    if "--" not in words[1:-1]:
        sys.exit((__doc__ or "").rstrip())
    split = words.index("--")
    program = Path(words[split + 1]).resolve()
    # As Python itself does for a program, unless it is told to leave the path alone.
    sys.argv = [str(program), *words[split + 2 :]]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(program.parent)
    for word in words[:split]:
        name, _, system = word.partition("=")
        stand_in_for(name, import_module(f"cupycorr.compat.{system}") if system else None)
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
