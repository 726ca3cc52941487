"""Models compiled ahead of time by AOTInductor call the operator back."""

import shutil
import subprocess
import sys

import pytest
from tensors import difference, pair

torch = pytest.importorskip("torch")

from torch.export import Dim, export  # noqa: E402

from cupycorr import SpatialCorrelationSampler  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Skipping serialization"
    ),
]

TORCH_2_6 = torch.__version__.startswith("2.6.")
SHAPE, OTHER = (2, 3, 9, 14), (4, 3, 12, 17)


class Network(torch.nn.Module):
    """The layer between operators that AOTInductor generates code for."""

    def __init__(self):
        super().__init__()
        self.match = SpatialCorrelationSampler(3, (3, 4), 2, 1, 1, 2)

    def forward(self, image1, image2):
        return self.match(2 * image1, image2 + 1).flatten(1, 2).relu()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Return the path of a compiled network, which takes any batch and any size."""
    sizes = dict.fromkeys((0, 2, 3), Dim.AUTO)
    program = export(Network(), pair(SHAPE, "float32"), dynamic_shapes=(sizes, sizes))
    path = tmp_path_factory.mktemp("aot") / "network.pt2"
    # torch 2.6 has no such option.
    quick = {} if TORCH_2_6 else {"aot_inductor.compile_wrapper_opt_level": "O0"}
    return torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=quick
    )


@pytest.mark.parametrize("shape", [SHAPE, OTHER], ids=["as exported", "other sizes"])
def test_a_package_computes_what_the_network_computes(package, shape):
    compiled, maps = torch._inductor.aoti_load_package(package), pair(shape, "float32")
    assert not difference(compiled(*maps), Network()(*maps))


def test_another_process_needs_the_operators_alone(package):
    # torch 2.10 itself forgets to import codecache.
    program = (
        "import sys, torch, torch._inductor.codecache, cupycorr.torch\n"
        "image = torch.ones(2, 3, 9, 14)\n"
        "print(torch._inductor.aoti_load_package(sys.argv[1])(image, image).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, package], capture_output=True, text=True
    )
    assert done.stdout == "torch.Size([2, 12, 5, 7])\n", done.stderr
