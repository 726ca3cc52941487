"""CUDA tensors: torch's memory, streams and devices, on whatever CUDA device is there.

The bridge runs wherever CuPy has a device: on CUDA tensors, or where torch has no CUDA on tensors
in managed memory. What it hands to CuPy is tested without a device too, with a CuPy that takes
notes.
"""

import contextlib
import ctypes
import sys
import types

import frames
import numpy as np
import pytest
from cases import GEOMETRIES

import cupycorr
from cupycorr import Geometry, Lookup, verify
from cupycorr.layer import DTYPES, Layer

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


class OfTorch:
    """CUDA tensors and streams of torch itself."""

    @staticmethod
    def place(tensor, number=0):
        return tensor.to(f"cuda:{number}")

    @staticmethod
    @contextlib.contextmanager
    def another_stream(number):
        stream = torch.cuda.Stream(number)
        with torch.cuda.stream(stream):
            yield stream.cuda_stream
        stream.synchronize()


@pytest.fixture
def tensors(monkeypatch):
    """Return what puts tensors on CuPy's devices, and makes streams current for torch."""
    if torch.cuda.is_available():
        return OfTorch
    import cupy
    import managed

    from cupycorr.torch import memory

    streams = managed.Streams()
    monkeypatch.setattr(memory, "current_stream", streams.current_stream)
    monkeypatch.setattr(torch.cuda, "current_device", cupy.cuda.runtime.getDevice)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return types.SimpleNamespace(place=managed.place, another_stream=streams.another)


@pytest.fixture
def calls(monkeypatch):
    """Record of each call of the CUDA engine: device, stream, and how workspace is allocated."""
    import cupy

    from cupycorr.cuda import engine as cuda_engine

    recorded, launch = [], cuda_engine.launch

    def record(*arguments, stream, **how):
        recorded.append((cupy.cuda.Device().id, stream.ptr, arguments[-1]))
        launch(*arguments, stream=stream, **how)

    monkeypatch.setattr(cuda_engine, "launch", record)
    return recorded


def placed(tensors, number=0, dtype=torch.float32, shape=SHAPE):
    """Return two maps on the CPU, and the same on a device, all of them differentiable."""
    whole = maps("cpu", dtype=dtype, shape=shape)
    there = [tensors.place(one, number).requires_grad_() for one in whole]
    return [one.requires_grad_() for one in whole], there


def derivatives(one, two, geometry, upstream):
    """Return a cost volume, its gradients, and a second derivative."""
    cost = cupycorr.correlation(one, two, geometry)
    grads = torch.autograd.grad(cost, (one, two), upstream, create_graph=True)
    return cost, *grads, torch.autograd.grad(grads[0], two, one.detach())[0]


def assert_same(got, want):
    got, want = (t.detach().cpu().double().numpy() for t in (got, want))
    assert verify.difference(got, want) is None


LAYOUTS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "every second column": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.gpu
class TestTheBridge:
    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            *(("FlowNetC", dtype) for dtype in DTYPES),
            *(("window at the border", dtype) for dtype in ("bfloat16", "float32")),
            *((name, "float32") for name in ("no samples", "no channels")),
        ],
    )
    def test_costs_and_derivatives_are_exact_on_integers(self, tensors, name, dtype):
        shape, geometry = GEOMETRIES[name]
        whole, there = placed(tensors, 0, getattr(torch, dtype), shape)
        upstream = maps("cpu", 1, whole[0].dtype, geometry.cost_shape(shape))[0].sign()
        want = derivatives(*whole, geometry, upstream)
        got = derivatives(*there, geometry, tensors.place(upstream))
        for one, other in zip(got, want, strict=True):
            assert (one.device.type, one.dtype) == ("cuda", other.dtype)
            assert_same(one, other)

    def test_absolute_differences_and_their_derivatives_are_exact_on_integers(self, tensors):
        def results(one, two, upstream):
            cost = cupycorr.correlation(one, two, WINDOW, similarity="l1")
            with torch.no_grad():
                grads = torch.ops.cupycorr.l1_grads(one, two, upstream, *fields(Layer(WINDOW)))
            tangent = torch.ops.cupycorr.l1_tangent(one, two, two, one, *fields(Layer(WINDOW)))
            return cost, *grads, *torch.autograd.grad(cost, (one, two), upstream), tangent

        from cupycorr.torch.derivatives import fields

        whole, there = placed(tensors)
        upstream = maps("cpu", 1, shape=WINDOW.cost_shape(SHAPE))[0]
        got = results(*there, tensors.place(upstream))
        for one, other in zip(got, results(*whole, upstream), strict=True):
            assert_same(one, other)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_maps_of_any_layout_are_taken(self, tensors, layout, dtype):
        whole, there = placed(tensors, 0, dtype)
        want, got = (
            cupycorr.correlation(*map(LAYOUTS[layout], two), WINDOW) for two in (whole, there)
        )
        assert_same(got, want)
        upstream = torch.ones((), dtype=dtype).expand(want.shape)
        wanted = torch.autograd.grad(want, whole, upstream)
        upstream = tensors.place(torch.ones((), dtype=dtype)).expand(got.shape)
        for one, other in zip(torch.autograd.grad(got, there, upstream), wanted, strict=True):
            assert_same(one, other)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("geometry", [GEOMETRY, WINDOW], ids=["patch", "window"])
    def test_gradients_have_the_memory_format_of_their_maps(self, tensors, geometry, dtype):
        whole = maps("cpu", dtype=getattr(torch, dtype))
        for order in (torch.channels_last, torch.contiguous_format):
            there = [tensors.place(one.contiguous(memory_format=order)) for one in whole]
            for inputs in (there, there[:1], there[1:]):
                for fmap in there:
                    fmap.requires_grad_(any(fmap is one for one in inputs))
                cost = cupycorr.correlation(*there, geometry)
                assert cost.is_contiguous()
                for one in torch.autograd.grad(cost.sum(), inputs):
                    assert one.is_contiguous(memory_format=order)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_an_array_has_the_memory_of_its_tensor_and_keeps_it(self, tensors, dtype):
        from cupycorr.torch import memory as torch_cuda

        tensor = tensors.place(maps("cpu", 1, getattr(torch, dtype))[0])
        address, bits = tensor.data_ptr(), tensor.detach().cpu().view(torch.uint8).flatten()
        array = torch_cuda._array(tensor)
        del tensor
        assert (array.data.ptr, array.shape, array.flags.c_contiguous) == (address, SHAPE, True)
        assert array.get().tobytes() == bits.numpy().tobytes()

    def test_work_goes_to_torchs_current_stream(self, tensors, calls):
        whole, there = placed(tensors)
        with tensors.another_stream(0) as stream:
            got = derivatives(*there, WINDOW, tensors.place(torch.ones(WINDOW.cost_shape(SHAPE))))
        assert {(device, at) for device, at, _ in calls} == {(0, stream)}
        want = derivatives(*whole, WINDOW, torch.ones(WINDOW.cost_shape(SHAPE)))
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)

    def test_work_goes_to_the_tensors_device_whichever_is_current(self, tensors, calls):
        import cupy

        if cupy.cuda.runtime.getDeviceCount() < 2:
            pytest.skip("needs two devices")
        whole, there = placed(tensors, 1)
        with tensors.another_stream(1) as stream:
            cost = cupycorr.correlation(*there, WINDOW)
        assert [call[:2] for call in calls] == [(1, stream)]
        assert (cost.device.index, cupy.cuda.Device().id) == (1, 0)
        assert_same(cost, cupycorr.correlation(*whole, WINDOW))

    def test_costs_of_float32_follow_the_precision_of_torchs_matrix_products(self, tensors):
        # TF32 holds 1 and 2, but not what is between 1 and 1 + 2 ** -10.
        whole = torch.full((1, 8, 6, 20), 1 + 2.0**-12)
        one = tensors.place(whole).contiguous(memory_format=torch.channels_last).requires_grad_()
        two = tensors.place(2 * torch.ones_like(whole)).contiguous(
            memory_format=torch.channels_last
        )
        products = {"highest": 16 * (1 + 2.0**-12), "high": 16.0}
        before = torch.get_float32_matmul_precision()
        try:
            for precision, product in products.items():
                torch.set_float32_matmul_precision(precision)
                cost = cupycorr.correlation(one, two, Geometry())
                assert (cost.cpu() == product).all()
                (grad,) = torch.autograd.grad(cost, one, cost)
                assert (grad.cpu() == 2 * product).all()
        finally:
            torch.set_float32_matmul_precision(before)

    def test_a_backward_pass_follows_the_precision_of_its_own_time(self, tensors):
        one, two = (
            tensors.place(torch.ones(1, 8, 6, 20)).contiguous(memory_format=torch.channels_last)
            for _ in range(2)
        )
        one.requires_grad_()
        before = torch.get_float32_matmul_precision()
        try:
            for forward, backward, rounded in (
                ("high", "highest", False),
                ("highest", "high", True),
            ):
                torch.set_float32_matmul_precision(forward)
                cost = cupycorr.correlation(one, two, Geometry())
                torch.set_float32_matmul_precision(backward)
                (grad,) = torch.autograd.grad(cost, one, torch.full_like(cost, 1 + 2.0**-12))
                assert (grad.cpu() == (1 if rounded else 1 + 2.0**-12)).all()
        finally:
            torch.set_float32_matmul_precision(before)

    def test_workspace_is_torchs(self, tensors, calls):
        import cupy

        cupycorr.correlation(*placed(tensors)[1], WINDOW)
        (*_, allocate), *_ = calls
        address, owner = allocate(48)
        assert (owner.device.index, owner.nbytes, owner.data_ptr()) == (0, 48, address)
        assert not isinstance(owner, cupy.cuda.MemoryPointer)


@pytest.mark.gpu
class TestOnADevice:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", FEW)
    def test_results_and_gradients_are_right(self, cuda, name, dtype):
        shape, geometry = GEOMETRIES[name]
        engine = verify.torch_engine("cuda")
        errors = [check.error for check in verify.check(engine, shape, Layer(geometry), dtype)]
        assert not any(errors), errors

    def test_torch_checks_first_and_second_derivatives(self, cuda):
        inputs = maps(cuda, dtype=torch.float64, shape=(1, 2, 4, 5), requires_grad=True)

        def cost(one, two):
            return cupycorr.correlation(one, two, WINDOW)

        assert torch.autograd.gradcheck(cost, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(cost, inputs, fast_mode=True)

    def test_inputs_are_not_copied_and_results_are_torchs(self, cuda):
        from cupycorr.torch import memory as torch_cuda

        (one,) = maps(cuda, 1)
        assert torch_cuda._array(one).data.ptr == one.data_ptr()
        before = torch.cuda.memory_allocated()
        cost = cupycorr.correlation(one, one, GEOMETRY)
        assert torch.cuda.memory_allocated() - before >= cost.numel() * 4

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
        from cupycorr.torch.derivatives import fields

        torch.library.opcheck(
            torch.ops.cupycorr.cost.default,
            (*maps(cuda, requires_grad=True), *fields(Layer(GEOMETRY))),
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


class Engine(types.SimpleNamespace):
    """A CUDA engine that computes with NumPy, and notes what it is given and what is current."""

    def __init__(self):
        self.RESULTS = {"cost": ("cost",), "grads": ("grad_fmap1", "grad_fmap2")}
        self.now, self.notes, self.imported = [-1, -1], [], []

    def current_device(self):
        return self.now[1]

    def launch(
        self, what, shape, addresses, layer, dtype, allocate, *, stream, channels_last, tf32
    ):
        from cupycorr.cpu import engine as numpy_engine

        self.notes.append((list(self.now), dtype, dict(addresses), allocate, stream.ptr))
        # uint16 is what the NumPy engine takes for bfloat16.
        stored = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        arrays = {}
        for name, address in addresses.items():
            size = layer.geometry.cost_shape(shape) if "cost" in name else shape
            memory = (ctypes.c_byte * (stored.itemsize * np.prod(size))).from_address(address)
            arrays[name] = np.frombuffer(memory, stored).reshape(size)
            if channels_last and "cost" not in name:
                samples, channels, height, width = size
                lies = arrays[name].reshape(samples, height, width, channels)
                arrays[name] = lies.transpose(0, 3, 1, 2)
        numpy_engine.run(what, arrays, layer)

    def from_dlpack(self, tensor):
        array = torch.from_dlpack(tensor)
        self.imported.append(array.data_ptr())
        return types.SimpleNamespace(data=types.SimpleNamespace(ptr=array.data_ptr()))

    @contextlib.contextmanager
    def made_current(self, whose, number):
        before, self.now[whose] = self.now[whose], number
        yield
        self.now[whose] = before


@pytest.fixture
def bridge(monkeypatch):
    """Return the bridge with that engine."""
    from cupycorr.torch import memory as torch_cuda

    engine = Engine()
    engine.cuda = types.SimpleNamespace(Device=lambda number: engine.made_current(1, number))
    engine.cupy = engine
    monkeypatch.setitem(sys.modules, "cupy", engine)
    monkeypatch.setattr(torch_cuda, "_engine", lambda: engine)
    monkeypatch.setattr(torch_cuda, "_exchanged", set())
    monkeypatch.setattr(torch_cuda, "current_stream", lambda number: 77)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: engine.now[0])
    monkeypatch.setattr(torch.cuda, "device", lambda number: engine.made_current(0, number))
    return torch_cuda, engine


class TestTheBridgeWithoutADevice:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_computes_on_the_tensors_own_memory(self, bridge, dtype):
        torch_cuda, engine = bridge
        one, two = maps("cpu", dtype=dtype)
        cost = torch.empty(GEOMETRY.cost_shape(SHAPE), dtype=dtype)
        tensors = {"fmap1": one, "fmap2": two, "cost": cost}
        torch_cuda.lend("cost", tensors, Layer(GEOMETRY))
        grads = {"grad_fmap1": torch.empty_like(one), "grad_fmap2": torch.empty_like(two)}
        upstream = {"fmap1": one, "fmap2": two, "grad_cost": cost}
        torch_cuda.lend("grads", upstream | grads, Layer(GEOMETRY))
        assert_same(cost, cupycorr.correlation(one, two, GEOMETRY))
        (now, name, addresses, _, stream), _ = engine.notes
        assert (now, stream) == ([-1, -1], 77)
        assert name == str(dtype).removeprefix("torch.")
        assert addresses == {name: tensor.data_ptr() for name, tensor in tensors.items()}

    def test_memory_comes_by_dlpack_once_and_then_by_the_same_address(self, bridge):
        torch_cuda, engine = bridge
        tensors = dict(zip(("fmap1", "fmap2", "cost"), maps("cpu", 3), strict=True))
        for _ in range(3):
            torch_cuda.lend("cost", tensors, Layer(Geometry()))
        addresses = [tensor.data_ptr() for tensor in tensors.values()]
        assert engine.imported == addresses
        assert [list(note[2].values()) for note in engine.notes] == [addresses] * 3

    @pytest.mark.parametrize("now", [[0, -1], [-1, 0], [1, 0]])
    def test_the_tensors_device_is_current_while_it_computes(self, bridge, now):
        torch_cuda, engine = bridge
        engine.now = list(now)
        tensors = dict(zip(("fmap1", "fmap2", "cost"), maps("cpu", 3), strict=True))
        torch_cuda.lend("cost", tensors, Layer(Geometry()))
        assert (engine.notes[0][0], engine.now) == ([-1, -1], now)

    def test_workspace_is_torchs(self, bridge, monkeypatch):
        torch_cuda, engine = bridge
        tensors = dict(zip(("fmap1", "fmap2", "cost"), maps("cpu", 3), strict=True))
        torch_cuda.lend("cost", tensors, Layer(Geometry()))
        address, owner = engine.notes[0][3](48)
        assert (owner.data_ptr(), owner.nbytes, owner.device) == (
            address,
            48,
            tensors["cost"].device,
        )

    def test_few_functions_lie_between_a_call_and_the_engine(self, bridge, monkeypatch):
        _, engine = bridge
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        stacks = []
        monkeypatch.setattr(engine, "launch", lambda *a, **o: stacks.append(frames.stack()))
        one, two = (fmap.requires_grad_() for fmap in maps("cpu"))
        cupycorr.spatial_correlation_sample(one, two).sum().backward()
        cupycorr.SpatialCorrelationSampler()(one, two)
        assert len(stacks) == 3
        for names in stacks:
            # The engine itself launches: a test in tests/gpu.
            names.append("launch")
            assert len(names) <= 7, names
            assert len(set(names)) == len(names), names

    def test_channels_last_maps_are_read_where_they_lie(self, bridge):
        torch_cuda, engine = bridge
        one, two = (LAYOUTS["channels last"](fmap) for fmap in maps("cpu"))
        want = cupycorr.correlation(one, two, GEOMETRY)
        cost = torch.empty_like(want)
        for other in (two, two.contiguous()):
            torch_cuda.lend("cost", {"fmap1": one, "fmap2": other, "cost": cost}, Layer(GEOMETRY))
            assert_same(cost, want)
        places = [note[2]["fmap1"] == one.data_ptr() for note in engine.notes]
        assert places == [True, False]  # beside another layout it is copied

    @pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
    def test_traced_gradients_have_the_memory_format_of_their_maps(self, order):
        from cupycorr.torch.derivatives import fields

        with torch._subclasses.FakeTensorMode():
            fmap = torch.empty(SHAPE, device="cuda", memory_format=order)
            cost = torch.empty(GEOMETRY.cost_shape(SHAPE), device="cuda")
            grads = torch.ops.cupycorr.grads(fmap, fmap, cost, *fields(Layer(GEOMETRY)))
        assert all(one.is_contiguous(memory_format=order) for one in grads)

    @pytest.mark.parametrize("which", [(1, 2), (1,), (2,)], ids=str)
    def test_gradients_are_computed_where_they_lie(self, bridge, which):
        torch_cuda, engine = bridge
        one, two = (LAYOUTS["channels last"](fmap.requires_grad_()) for fmap in maps("cpu"))
        cost = cupycorr.correlation(one, two, GEOMETRY)
        want = torch.autograd.grad(cost.sum(), (one, two))
        grads = {f"grad_fmap{i}": torch.empty_like(one) for i in which}
        inputs = {"fmap1": one, "fmap2": two, "grad_cost": torch.ones_like(cost)}
        torch_cuda.lend("grads", inputs | grads, Layer(GEOMETRY))
        for i in which:
            grad = grads[f"grad_fmap{i}"]
            assert_same(grad, want[i - 1])
            assert engine.notes[0][2][f"grad_fmap{i}"] == grad.data_ptr()

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
        torch_cuda.lend("cost", {"fmap1": one, "fmap2": two, "cost": cost}, Layer(GEOMETRY))
        assert_same(cost, want)


@pytest.fixture
def _no_engine(monkeypatch):
    """Have the CUDA engine imported anew."""
    monkeypatch.delitem(sys.modules, "cupycorr.cuda.engine", raising=False)
    monkeypatch.delattr("cupycorr.cuda.engine", raising=False)


@pytest.mark.usefixtures("_no_engine")
def test_cuda_tensors_without_cupy_are_one_clear_error(monkeypatch):
    from cupycorr.torch import memory as torch_cuda

    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(
        RuntimeError, match=r"CuPy must be there .* pip install 'cupycorr\[cuda1[23]\]'"
    ):
        torch_cuda._engine()


@pytest.mark.usefixtures("_no_engine")
@pytest.mark.parametrize(
    "error", ["ImportError('circular')", "ModuleNotFoundError('No fastrlock', name='fastrlock')"]
)
def test_a_cupy_that_cannot_be_imported_says_so_itself(monkeypatch, tmp_path, error):
    from cupycorr.torch import memory as torch_cuda

    (tmp_path / "cupy.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(ImportError, match=r"^(circular|No fastrlock)$"):
        torch_cuda._engine()


def test_torch_for_another_kind_of_gpu_is_refused(monkeypatch):
    from cupycorr.torch import memory as torch_cuda

    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(RuntimeError, match="must be on an NVIDIA GPU, got a torch built for ROCm"):
        torch_cuda._engine()


def looked_up(fmap1, fmap2, coords, upstream, lookup):
    """Return a lookup's cost, its levels and its gradients."""
    levels = cupycorr.pyramid(fmap2, lookup)
    cost = cupycorr.correlation_lookup(fmap1, levels, coords, lookup, scale=0.5)
    return cost, *levels, *torch.autograd.grad(cost, (fmap1, fmap2, coords), upstream)


@pytest.mark.gpu
class TestTheLookup:
    LOOKUP = Lookup((2, 1), 2, order="xy")

    def arguments(self, dtype=torch.float32):
        fmap1, fmap2 = maps("cpu", dtype=dtype, requires_grad=True)
        y, x = np.indices(SHAPE[2:])
        coords = torch.from_numpy(np.stack([x + 1.25, y - 2.5]).astype("f4"))[None].repeat(
            2, 1, 1, 1
        )
        upstream = maps("cpu", 1, dtype, self.LOOKUP.cost_shape(SHAPE, coords.shape))[0]
        return fmap1, fmap2, coords.requires_grad_(), upstream

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_results_are_exact_on_integers(self, tensors, dtype):
        given = self.arguments(dtype)
        there = [tensors.place(one.detach()) for one in given]
        for one in there[:3]:
            one.requires_grad_()
        got, want = looked_up(*there, self.LOOKUP), looked_up(*given, self.LOOKUP)
        for one, other in zip(got, want, strict=True):
            assert (one.device.type, one.dtype) == ("cuda", other.dtype)
            assert_same(one, other)

    def test_samples_of_a_volume_are_exact_on_integers(self, tensors):
        def samples(volume, coords, upstream):
            cost = cupycorr.volume_lookup(volume, coords, self.LOOKUP)
            return cost, *torch.autograd.grad(cost, (volume, coords), upstream)

        _, _, coords, upstream = self.arguments()
        volume = maps("cpu", 1, shape=(2, *SHAPE[2:], 5, 6))[0].mul_(4).requires_grad_()
        given = volume, coords, upstream
        there = [tensors.place(one.detach()) for one in given]
        for one in there[:2]:
            one.requires_grad_()
        for one, other in zip(samples(*there), samples(*given), strict=True):
            assert_same(one, other)

    def test_work_goes_to_torchs_current_stream(self, tensors, monkeypatch):
        import cupy

        from cupycorr.cuda import lookup as cuda_lookup

        given, seen, run = self.arguments()[:3], [], cuda_lookup.run

        def record(*arguments, **how):
            seen.append(cupy.cuda.get_current_stream().ptr)
            run(*arguments, **how)

        monkeypatch.setattr(cuda_lookup, "run", record)
        there = [tensors.place(one.detach()) for one in given]
        with tensors.another_stream(0) as pointer:
            cost = cupycorr.correlation_lookup(*there, self.LOOKUP, scale=0.5)
        assert seen == [pointer, pointer]  # of the levels, and of the cost
        assert_same(cost, cupycorr.correlation_lookup(*given, self.LOOKUP, scale=0.5))
