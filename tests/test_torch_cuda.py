"""CUDA tensors: torch's memory, streams and devices, on whatever CUDA device is there.

What the bridge hands to CuPy is tested without a device too, with a CuPy that takes notes.
"""

import contextlib
import sys
import types

import numpy as np
import pytest
from cases import CASES

import cupycorr
from cupycorr import Geometry, verify

torch = pytest.importorskip("torch")

SHAPE = (2, 3, 8, 12)
GEOMETRY = Geometry(patch_size=3)
WINDOW = Geometry(3, 3, padding=1)
FEW = ["FlowNetC", "window at the border", "stride not dividing dilation_patch"]


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a torch with CUDA, and a CUDA device")
    return torch.device("cuda")


def maps(device, count=2, dtype=torch.float32, shape=SHAPE, **options):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-2, 3, (count, *shape), generator=generator)
    return [one.to(device, dtype).requires_grad_(**options) if options else one.to(device, dtype)
            for one in drawn]  # fmt: skip


def assert_same(got, want):
    got, want = (t.detach().cpu().double().numpy() for t in (got, want))
    assert verify.difference(got, want) is None


@pytest.mark.gpu
class TestOnADevice:
    @pytest.mark.parametrize("dtype", verify.PRECISION)
    @pytest.mark.parametrize("name", FEW)
    def test_results_and_gradients_are_right(self, cuda, name, dtype):
        shape, geometry = CASES[name]
        engine = verify.torch_engine("cuda")
        errors = [check.error for check in verify.check(engine, shape, geometry, dtype)]
        assert not any(errors), errors

    def test_torch_checks_first_and_second_derivatives(self, cuda):
        inputs = maps(cuda, dtype=torch.float64, shape=(1, 2, 4, 5), requires_grad=True)

        def cost(one, two):
            return cupycorr.correlation(one, two, WINDOW)

        assert torch.autograd.gradcheck(cost, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(cost, inputs, fast_mode=True)

    def test_inputs_are_not_copied_and_results_are_torchs(self, cuda):
        from cupycorr import torch_cuda

        (one,) = maps(cuda, 1)
        assert torch_cuda._array(one).data.ptr == one.data_ptr()
        before = torch.cuda.memory_allocated()
        cost = cupycorr.correlation(one, one, GEOMETRY)
        assert torch.cuda.memory_allocated() - before >= cost.numel() * 4

    @pytest.mark.parametrize("change", [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.flip(3).flip(3).transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
        lambda t: t[:1].expand(t.shape),
    ], ids=["channels_last", "transposed", "misaligned", "expanded"])  # fmt: skip
    def test_tensors_of_any_layout_are_accepted(self, cuda, change):
        one, two = maps(cuda)
        one, two = change(one), change(two)
        want = cupycorr.correlation(one.cpu(), two.cpu(), GEOMETRY)
        assert_same(cupycorr.correlation(one, two, GEOMETRY), want)

    def test_work_goes_to_torchs_current_stream(self, cuda):
        one, two = maps(cuda)
        want = cupycorr.correlation(one.cpu(), two.cpu(), WINDOW)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            cost = cupycorr.correlation(one, two, WINDOW)
            assert not stream.query()  # queued behind the sleep, which nothing waits for
        stream.synchronize()
        assert_same(cost, want)

    def test_a_captured_graph_computes_anew(self, cuda):
        one, two = maps(cuda, requires_grad=False)
        cupycorr.correlation(one, two, WINDOW)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cost = cupycorr.correlation(one, two, WINDOW)
        one.mul_(2)
        graph.replay()
        assert_same(cost, cupycorr.correlation(one.cpu(), two.cpu(), WINDOW))

    def test_the_second_device_is_used_and_the_first_left_alone(self, cuda):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two devices")
        one, two = maps("cuda:1", requires_grad=True)
        before = torch.cuda.memory_allocated(0)
        cost = cupycorr.correlation(one, two, WINDOW)
        cost.sum().backward()
        assert {t.device.index for t in (cost, one.grad, two.grad)} == {1}
        assert torch.cuda.memory_allocated(0) == before
        assert_same(cost, cupycorr.correlation(one.cpu(), two.cpu(), WINDOW))

    @pytest.mark.parametrize("inside", [torch.float16, torch.bfloat16])
    def test_autocast_computes_in_16_bits(self, cuda, inside):
        one, two = maps(cuda, requires_grad=True)
        with torch.autocast("cuda", inside):
            cost = cupycorr.correlation(one, two, GEOMETRY)
        cost.sum().backward()
        assert (cost.dtype, one.grad.dtype) == (inside, torch.float32)

    def test_compiled_it_stays_one_node(self, cuda):
        one, two = maps(cuda)
        compiled = torch.compile(lambda a, b: cupycorr.correlation(a, b, GEOMETRY) * 2,
                                 fullgraph=True)  # fmt: skip
        assert_same(compiled(one, two), cupycorr.correlation(one, two, GEOMETRY) * 2)

    def test_opcheck_passes(self, cuda):
        from cupycorr.torch_ops import _fields

        torch.library.opcheck(
            torch.ops.cupycorr.cost.default,
            (*maps(cuda, requires_grad=True), *_fields(GEOMETRY), False),
        )

    def test_checkpoints_inference_mode_and_determinism(self, cuda):
        one, two = maps(cuda, requires_grad=True)
        want = cupycorr.correlation(one, two, GEOMETRY)
        torch.use_deterministic_algorithms(True)
        try:
            cost = torch.utils.checkpoint.checkpoint(
                cupycorr.correlation, one, two, GEOMETRY, use_reentrant=False
            )
            cost.sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        with torch.inference_mode():
            assert_same(cupycorr.correlation(one, two, GEOMETRY), want)


class Cupy(types.ModuleType):
    """A CuPy that notes which device and stream are current, and hands out NumPy arrays."""

    def __init__(self):
        super().__init__("cupy")
        self.now = []
        self.cuda = types.SimpleNamespace(Device=self.device, ExternalStream=self.stream)

    @contextlib.contextmanager
    def device(self, number):
        self.now.append(f"device {number}")
        yield
        self.now.pop()

    @contextlib.contextmanager
    def stream(self, pointer, number):
        self.now.append(f"stream {pointer} of device {number}")
        yield
        self.now.pop()

    @staticmethod
    def from_dlpack(tensor):
        return np.from_dlpack(tensor)


@pytest.fixture
def bridge(monkeypatch):
    """Return the bridge with that CuPy, a CUDA engine that computes with NumPy, and its notes."""
    from cupycorr import numpy_engine, torch_cuda

    cupy, notes = Cupy(), []

    def note(compute):
        def engine(*arguments, dtype, allocate, **options):
            notes.append((list(cupy.now), dtype, arguments, allocate))
            # uint16 is what the NumPy engine takes for bfloat16.
            arrays = (
                a.view(np.uint16) if isinstance(a, np.ndarray) and dtype == "bfloat16" else a
                for a in arguments
            )
            compute(*arrays, **options)

        return engine

    engine = types.SimpleNamespace(
        forward=note(numpy_engine.forward), backward=note(numpy_engine.backward)
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch_cuda, "_engine", lambda: engine)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77)
    )
    return torch_cuda, notes


class TestTheBridgeWithoutADevice:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_computes_on_the_tensors_own_memory(self, bridge, dtype):
        torch_cuda, notes = bridge
        one, two = maps("cpu", dtype=dtype)
        cost = torch.empty(GEOMETRY.cost_shape(SHAPE), dtype=dtype)
        torch_cuda.forward(one, two, cost, GEOMETRY)
        grads = torch.empty_like(one), torch.empty_like(two)
        torch_cuda.backward(cost, one, two, *grads, GEOMETRY)
        assert_same(cost, cupycorr.correlation(one, two, GEOMETRY))
        (_, name, arrays, _), _ = notes
        assert name == str(dtype).removeprefix("torch.")
        pointers = [array.ctypes.data for array in arrays[:3]]
        assert pointers == [t.data_ptr() for t in (one, two, cost)]

    def test_device_and_stream_are_current_while_it_computes(self, bridge):
        torch_cuda, notes = bridge
        one, two = maps("cpu")
        torch_cuda.forward(one, two, torch.empty(GEOMETRY.cost_shape(SHAPE)), GEOMETRY)
        assert notes[0][0] == ["device None", "stream 77 of device None"]

    def test_workspace_is_torchs(self, bridge, monkeypatch):
        torch_cuda, notes = bridge
        one, two = maps("cpu")
        torch_cuda.forward(one, two, torch.empty(GEOMETRY.cost_shape(SHAPE)), GEOMETRY)
        made, empty = [], torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, **o: made.append(empty(*a, **o)) or made[-1])
        volume = notes[0][3]((2, 3), "float64")
        assert (volume.shape, volume.dtype) == ((2, 3), np.float64)
        assert volume.ctypes.data == made[0].data_ptr()

    @pytest.mark.parametrize("layout", ["strided", "differentiated"])
    def test_it_takes_any_tensor(self, bridge, layout):
        torch_cuda, _ = bridge
        one, two = maps("cpu")
        want = cupycorr.correlation(one, two, GEOMETRY)
        if layout == "strided":
            one = one.transpose(1, 3).contiguous().transpose(1, 3)
        else:
            one.requires_grad_()
        cost = torch.empty(GEOMETRY.cost_shape(SHAPE))
        torch_cuda.forward(one, two, cost, GEOMETRY)
        assert_same(cost, want)


def test_cuda_tensors_without_cupy_are_one_clear_error(monkeypatch):
    from cupycorr import torch_cuda

    monkeypatch.setitem(sys.modules, "cupycorr.cuda_engine", None)
    monkeypatch.delattr(cupycorr, "cuda_engine", raising=False)
    with pytest.raises(
        RuntimeError, match=r"CuPy must be there .* pip install 'cupycorr\[cuda12\]'"
    ):
        torch_cuda._engine()


def test_torch_for_another_kind_of_gpu_is_refused(monkeypatch):
    from cupycorr import torch_cuda

    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(RuntimeError, match="must be on an NVIDIA GPU, got a torch built for ROCm"):
        torch_cuda._engine()
