"""The CUDA kernels, run on the processor by hostcuda.h: what can be known without a GPU."""

import host
import pytest
from cases import CASES
from host import DEVICES, SM_75

from cupycorr import verify

pytestmark = pytest.mark.skipif(host.unavailable() is not None, reason=str(host.unavailable()))

BY_ID = pytest.mark.parametrize("case", CASES)
# Phases, a window, vectors, and everything at once.
MIXED = (
    "even patch, dilated",
    "spatial-correlation-sampler's defaults",
    "FlowNetC",
    "everything differs per axis",
)


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead(request):
    """Compile in the background what the selected tests will need."""
    requests = []
    for item in request.session.items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if item.module is request.module and {"case", "device"} <= values.keys():
            launches = host.launches(*CASES[values["case"]], values.get("dtype", "float32"),
                                     DEVICES[values["device"]])  # fmt: skip
            requests += [(launch, values.get("mode", "run"), None) for launch in launches]
    with host.compiling_ahead(requests):
        yield


def errors(engine, case, dtype="float32"):
    shape, geometry = CASES[case] if isinstance(case, str) else case
    return [check for check in verify.check(engine, shape, geometry, dtype) if check.error]


@pytest.mark.parametrize("device", ["sm_75", "sm_80"])
@BY_ID
def test_tiled_kernels_are_correct(case, device):
    assert not errors(host.host_engine(DEVICES[device]), case)


@BY_ID
def test_plain_kernels_are_correct(case):
    assert not errors(host.host_engine(SM_75, plain=True), case)


@pytest.mark.parametrize("device", ["sm_80"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("case", MIXED)
def test_other_dtypes_are_correct(case, dtype, device):
    assert not errors(host.host_engine(DEVICES[device]), case, dtype)
