"""What cupycorr is where torch is not installed, in processes that cannot import it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(program):
    hidden = "import sys; sys.modules['torch'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", hidden + program], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["cupycorr", "cupycorr.compat"])
def test_help_shows_what_there_is(name):
    out = run(f"import pydoc, {name}; print(pydoc.render_doc({name}))")
    assert name in out.splitlines()[0]


@pytest.mark.parametrize("name", ["cupycorr", "cupycorr.compat"])
def test_members_are_those_that_can_be_had(name):
    program = f"import inspect, {name}; print(dict(inspect.getmembers({name})).keys())"
    assert not {"SpatialCorrelationSampler", "nvidia"} & set(run(program).split("'"))
    run(f"from {name} import *")


def test_everything_else_can_be_imported_by_a_star():
    program = (
        "import numpy as np\n"
        "from cupycorr import *\n"
        "print(correlation(np.ones((1, 2, 3, 4)), np.ones((1, 2, 3, 4)), Geometry()).shape)"
    )
    assert run(program) == "(1, 1, 1, 3, 4)\n"


@pytest.mark.parametrize(
    ("module", "name"), [("cupycorr", "SpatialCorrelationSampler"), ("cupycorr.compat", "nvidia")]
)
def test_what_needs_torch_is_not_there_and_says_why(module, name):
    program = (
        f"import {module}\n"
        f"print(hasattr({module}, '{name}'))\n"
        "try:\n"
        f"    {module}.{name}\n"
        "except AttributeError as error:\n"
        "    print(error)"
    )
    assert run(program) == f"False\n{name} needs torch: pip install 'cupycorr[torch]'\n"
