"""Count the frames of the package that are on the stack, or that a call enters."""

import sys
from pathlib import Path

import cupycorr

PACKAGE = str(Path(cupycorr.__file__).parent)


def stack():
    """Return the names of the package's functions that are on the stack, the outermost first."""
    names, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names[::-1]


def entered(call):
    """Return how many frames of the package a call enters, once what it keeps is there."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    for _ in range(3):
        call()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count
