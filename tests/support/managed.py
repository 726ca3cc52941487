"""CUDA tensors for a torch without CUDA, in managed memory, which CuPy's devices and the CPU share.

Whatever torch computes of them, it computes on the CPU; cupycorr's operators run on the device.
"""

import contextlib
import ctypes

import cupy
import torch
from torch.utils._pytree import tree_leaves, tree_map_only


class Managed(torch.Tensor):
    """A tensor that says it is on a CUDA device; ``inner`` has its memory, on the CPU for torch."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = True

    @staticmethod
    def __new__(cls, inner, number):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype
        )

    def __init__(self, inner, number):
        self.inner = inner
        self.number = number

    @property
    def device(self):
        return torch.device("cuda", self.number)

    def get_device(self):
        return self.number

    def data_ptr(self):
        return self.inner.data_ptr()

    def _array(self):
        """Return the memory as CuPy has it; bfloat16 never comes here but as its bits."""
        inner, dtype = self.inner, str(self.dtype).removeprefix("torch.")
        memory = cupy.cuda.UnownedMemory(inner.data_ptr(), inner.nbytes, inner, self.number)
        strides = tuple(step * inner.itemsize for step in inner.stride())
        return cupy.ndarray(inner.shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)

    def __dlpack_device__(self):
        return self._array().__dlpack_device__()

    def __dlpack__(self, **options):
        orders = torch.contiguous_format, torch.channels_last
        fitting = orders if self.dim() == 4 else orders[:1]
        assert any(self.is_contiguous(memory_format=order) for order in fitting)
        return self._array().__dlpack__(**options)

    def cpu(self):
        cupy.cuda.Device(self.number).synchronize()
        return self.inner.clone()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace == "cupycorr":
            return function._op_dk(torch._C.DispatchKey.CUDA, *args, **(kwargs or {}))
        managed = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        (number,) = {tensor.number for tensor in managed}
        cupy.cuda.Device(number).synchronize()
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.inner, (args, kwargs or {}))
        held = {tensor.inner.untyped_storage().data_ptr() for tensor in managed}

        def wrap(result):
            alias = result.untyped_storage().data_ptr() in held
            return cls(result, number) if alias else place(result, number)

        return tree_map_only(torch.Tensor, wrap, function(*args, **kwargs))


def place(tensor, number=0):
    """Copy a tensor of the CPU to a device, with its strides."""
    spread = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    with cupy.cuda.Device(number):
        memory = cupy.cuda.malloc_managed(max(spread, 1) * tensor.itemsize)
    buffer = (ctypes.c_byte * memory.mem.size).from_address(memory.ptr)
    buffer.memory = memory  # lives as long as torch uses it
    flat = torch.frombuffer(buffer, dtype=torch.uint8)[: max(spread, 1) * tensor.itemsize]
    inner = flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    # An expanded tensor has several places in one; it takes one value of each.
    flat.view(tensor.dtype)[:spread] = tensor.as_strided((spread,), (1,)) if tensor.numel() else 0
    return Managed(inner, number)


class Streams:
    """torch's current streams, which are CuPy's here."""

    def __init__(self):
        self._current = {}

    def current_stream(self, number):
        return self._current.get(number, 0)

    @contextlib.contextmanager
    def another(self, number):
        """Make a new stream of a device torch's current one; return its address."""
        with cupy.cuda.Device(number):
            stream = cupy.cuda.Stream(non_blocking=True)
        self._current[number] = stream.ptr
        yield stream.ptr
        stream.synchronize()
        del self._current[number]
