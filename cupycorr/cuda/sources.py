"""The texts of the CUDA kernels, with their constants: all that a compiler needs to see.

Apart from the engine they are read by whoever compiles without a device. The constants come first;
they replace the block of defaults that lets a file stand alone. Our own includes are pasted in,
because CuPy's cache of compiled kernels would not notice that an included file changed, and every
line keeps its file and number for the compiler's messages.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

from cupycorr.cuda.launch import Launch

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


def source(launch: Launch) -> str:
    """Return the CUDA C source of a launch's kernel."""
    seen: set[str] = set()
    lines = ["#define CUPYCORR_CONSTANTS 1", _paste("device.cuh", seen)]
    for name, value in launch.constants:
        if isinstance(value, str):
            lines.append(f"using {name} = {value};")
        elif isinstance(value, bool):
            lines.append(f"constexpr bool {name} = {str(value).lower()};")
        else:
            lines.append(f"constexpr int {name} = {value};")
    return "\n".join([*lines, _paste(launch.source, seen)])


def _paste(name: str, seen: set[str]) -> str:
    """Return the text of a file, its includes pasted in where they are met first."""
    seen.add(name)

    def included(match: re.Match[str]) -> str:
        following = match.string.count("\n", 0, match.start()) + 2
        text = "" if match[1] in seen else _paste(match[1], seen)
        return f'{text}\n#line {following} "{name}"'

    return f'#line 1 "{name}"\n{_INCLUDE.sub(included, _read(name))}'


@cache
def _read(name: str) -> str:
    text = resources.files("cupycorr.kernels").joinpath(name).read_text(encoding="utf-8")
    return text.replace("#pragma once\n", "\n")
