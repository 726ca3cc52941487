"""Several processes train a network, and share out distributed tensors among them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)
if torch.__version__.startswith("2.6."):
    # It also shards weights on GPUs only.
    pytest.skip("torch 2.6 hangs at times when gloo's processes end", allow_module_level=True)

from distributed_checks import CHECKS  # noqa: E402

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def launch(script):
    """Run a script on two processes of this machine; return what they print.

    Starting them takes longest, so many checks go into one script.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", ROOT / script],
        capture_output=True,
        text=True,
        timeout=600,  # of a hang; a busy machine takes a minute
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT / "examples"),
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def outcomes():
    lines = launch("tests/support/distributed_checks.py").splitlines()
    # Gloo of some versions prints lines of its own.
    ours = (json.loads(line) for line in lines if line.startswith("{"))
    return {name: error for check in ours for name, error in check.items()}


@pytest.mark.parametrize("name", CHECKS)
def test_processes_compute_what_one_computes(name, outcomes):
    assert outcomes[name] is None


def test_the_example_learns():
    out = launch("examples/distributed_training.py")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert losses[0] > 3  # guessing: log(25)
    assert losses[-1] < 0.1


def test_importing_the_operators_does_not_import_distributed_tensors():
    code = (
        "import sys, cupycorr, torch, cupycorr.torch.operators\n"
        "cupycorr.spatial_correlation_sample(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))\n"
        "print('torch.distributed.tensor' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
