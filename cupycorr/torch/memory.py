"""The bridge from CUDA tensors to the CUDA engine: memory by DLPack, and torch's stream.

Nothing is copied, and nothing waits for the device: outputs and workspace come from torch's
allocator, kernels go to torch's current stream of the tensors' device, whichever device is current.
Once the kernels of a layer are compiled (by a first call, or `cupycorr warmup`), a call can be
captured into a CUDA graph.

Tests run every line with CuPy on tensors in managed memory, where CuPy has a device and torch has
no CUDA (`TestTheBridge` in ``tests/torch/test_torch_cuda.py``). Only a torch with CUDA and a GPU
gives these lines real CUDA tensors; there the same tests take those, and `TestOnADevice` runs:

===================================  ==============================================================
line                                 test with CUDA tensors
===================================  ==============================================================
``torch.cuda.current_stream(...)``   test_work_goes_to_torchs_current_stream: queued behind what the
                                     stream holds; test_a_captured_graph_computes_anew
``tensor.__dlpack__(...)``           test_inputs_are_not_copied_and_results_are_torchs;
                                     test_maps_of_any_layout_are_taken
``torch.cuda.device(...)``           test_the_second_device_is_used_and_the_first_left_alone
``like.new_empty(...)``              test_workspace_is_torchs
===================================  ==============================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cupycorr.layer import Layer


def lend(what: str, tensors: Mapping[str, Tensor], layer: Layer) -> None:
    """Lend tensors' memory to the CUDA engine, which computes a layer's result into it.

    An input is copied only where it is not contiguous.

    Parameters
    ----------
    what, layer
        As for `cuda.engine.run`.
    tensors : mapping of name to Tensor, float16|bfloat16|float32|float64, on one CUDA device
        The names are those of `cuda.engine.run`. Inputs have any strides, results are contiguous.

    Raises
    ------
    RuntimeError
        If CuPy is missing or too old, or torch was built for another kind of GPU; otherwise as
        `cuda.engine.run`. An error of CuPy's own import is passed on.
    """
    engine, like = _engine(), tensors["fmap1"]
    with _on_stream_of(like):
        arrays = {name: _array(tensor) for name, tensor in tensors.items()}
        engine.run(what, arrays, layer, dtype=_dtype(like), allocate=_allocator(like))


def _engine() -> Any:
    if torch.version.hip is not None:
        raise RuntimeError(
            "CUDA tensors must be on an NVIDIA GPU, got a torch built for ROCm; move them to the "
            "CPU"
        )
    try:
        from cupycorr.cuda import engine as cuda_engine
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise
        raise RuntimeError(
            f"CuPy must be there to compute CUDA tensors, got: {error}; "
            f"pip install 'cupycorr[cuda{(torch.version.cuda or '12').partition('.')[0]}]'"
        ) from error
    return cuda_engine


class _Stream(NamedTuple):
    """A CUDA stream, in the protocol by which CuPy takes it."""

    address: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


class _Memory(NamedTuple):
    """A tensor's memory, in the protocol by which CuPy takes it: DLPack."""

    tensor: Tensor

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        # CuPy computes on torch's stream (`_on_stream_of`), so no stream has to wait.
        return self.tensor.__dlpack__(stream=-1, **options)


@contextmanager
def _on_stream_of(tensor: Tensor) -> Iterator[None]:
    """Make a tensor's device current, and for CuPy torch's current stream there."""
    import cupy

    stream = _Stream(torch.cuda.current_stream(tensor.device).cuda_stream)
    # torch exports memory of its current device only.
    with (
        torch.cuda.device(tensor.device),
        cupy.cuda.Device(tensor.device.index),
        cupy.cuda.Stream.from_external(stream),
    ):
        yield


def _array(tensor: Tensor) -> Any:
    """Return a tensor's memory as a CuPy array; what is not contiguous is copied.

    bfloat16 goes as its bits, which needs no such type on CuPy's side.
    """
    import cupy

    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return cupy.from_dlpack(_Memory(tensor))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _allocator(like: Tensor) -> Callable[[tuple[int, ...], str], Any]:
    """Return what allocates workspace from torch's memory, on a tensor's device."""

    def allocate(shape: tuple[int, ...], dtype: str) -> Any:
        return _array(like.new_empty(shape, dtype=getattr(torch, dtype)))

    return allocate
