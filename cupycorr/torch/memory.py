"""The bridge from CUDA tensors to the CUDA engine: their memory, and torch's stream.

Nothing is copied, and nothing waits for the device: outputs and workspace come from torch's
allocator, kernels go to torch's current stream of the tensors' device, whichever device is current.
Cost volumes and gradients of float32 use TF32 where torch's matrix products would, by the setting
at the time of the launch. As for torch's own layers, that of a backward pass may be another one.
A call of a layer on shapes that were there before only looks its launches up, so it can be captured
into a CUDA graph; the first call compiles, or loads what `cupycorr warmup` has compiled.

Memory is exchanged by DLPack when the first tensor of a dtype comes from a device. From then on its
address is handed over, which is the same memory and takes a tenth of the time.

Tests run every line with CuPy on tensors in managed memory, where CuPy has a device and torch has
no CUDA (`TestTheBridge` in ``tests/torch/test_torch_cuda.py``). Only a torch with CUDA and a GPU
gives these lines real CUDA tensors; there the same tests take those, and `TestOnADevice` runs:

===================================  ==============================================================
line                                 test with CUDA tensors
===================================  ==============================================================
``_cuda_getCurrentRawStream(...)``   test_work_goes_to_torchs_current_stream: queued behind what the
                                     stream holds; test_a_captured_graph_computes_anew
``tensor.__dlpack__(...)``           test_inputs_are_not_copied_and_results_are_torchs;
                                     test_maps_of_any_layout_are_taken
``torch.cuda.device(...)``           test_the_second_device_is_used_and_the_first_left_alone
``like.new_empty(...)``              test_workspace_is_torchs
===================================  ==============================================================
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cupycorr.layer import DTYPES, Layer
from cupycorr.lookup import Lookup, convert_all

_DTYPES = {getattr(torch, name): name for name in DTYPES}
_LOADED = "cupycorr.cuda.engine"
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""Return the address of torch's current stream on a device; None in a torch without CUDA."""
_precision: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
_VOLUMES = {"cost", "grad_cost"}  # not maps, nor their gradients
_exchanged: set[tuple[int, torch.dtype]] = set()
"""Of which devices and dtypes memory was exchanged by DLPack."""


def are_channels_last(fmap: Tensor, *others: Tensor) -> bool:
    """Whether maps all lie in memory as (N, H, W, C), and the first not as (N, C, H, W) as well."""
    return not fmap.is_contiguous() and all(
        tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (fmap, *others)
    )


def lend(what: str, tensors: Mapping[str, Tensor], layer: Layer) -> None:
    """Lend tensors' memory to the CUDA engine, which computes a layer's result into it.

    Maps and their gradients may all be contiguous in the order (N, H, W, C) as well
    (torch.channels_last). Any other input that is not contiguous is copied.

    Parameters
    ----------
    what, layer
        As for `cuda.engine.run`.
    tensors : mapping of name to Tensor, float16|bfloat16|float32|float64, on one CUDA device
        The names are those of `cuda.engine.run`. Inputs have any strides. Results are contiguous,
        but gradients are channels_last where the maps `are_channels_last`.

    Raises
    ------
    RuntimeError
        If CuPy is missing or too old, or torch was built for another kind of GPU; otherwise as
        `cuda.engine.run`. An error of CuPy's own import is passed on.
    """
    engine, like = _engine(), tensors["fmap1"]
    index, shape = like.get_device(), like.shape
    if not index == torch.cuda.current_device() == engine.current_device():
        with torch.cuda.device(index), engine.cupy.cuda.Device(index):
            lend(what, tensors, layer)
        return
    if 0 in shape:
        for name in engine.RESULTS[what]:
            if name in tensors:
                tensors[name].zero_()
        return
    channels_last = not like.is_contiguous() and are_channels_last(
        *(tensor for name, tensor in tensors.items() if name not in _VOLUMES)
    )
    # Copies of what is not contiguous are held until all is launched.
    dense = [
        tensor if tensor.is_contiguous() or (channels_last and name not in _VOLUMES)
        else tensor.contiguous()
        for name, tensor in tensors.items()
    ]  # fmt: skip
    if (index, like.dtype) in _exchanged:
        places = [tensor.data_ptr() for tensor in dense]
    else:
        places = [_array(tensor).data.ptr for tensor in dense]
        _exchanged.add((index, like.dtype))
    addresses = dict(zip(tensors, places, strict=True))

    stream = _stream_at(current_stream(index))
    tf32 = like.dtype is torch.float32 and _allows_tf32()
    engine.launch(
        what, shape, addresses, layer, _DTYPES[like.dtype], _allocator(like),
        stream=stream, channels_last=channels_last, tf32=tf32,
    )  # fmt: skip


def _allocator(like: Tensor) -> Any:
    """Return what allocates bytes from torch, on a tensor's device: (address, owner)."""

    def allocate(size: int) -> tuple[int, Tensor]:
        workspace = like.new_empty(size, dtype=torch.uint8)
        return workspace.data_ptr(), workspace

    return allocate


def _allows_tf32() -> bool:
    """Tell whether torch's matrix products of float32 may use TF32."""
    if _precision is None:  # torch < 2.9
        return torch._C._get_cublas_allow_tf32()
    return bool(_precision("cuda", "matmul") == "tf32")


def _engine() -> Any:
    if torch.version.hip is not None:
        raise RuntimeError(
            "CUDA tensors must be on an NVIDIA GPU, got a torch built for ROCm; move them to the "
            "CPU"
        )
    if _LOADED in sys.modules:
        return sys.modules[_LOADED]
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
    """A CUDA stream, as CuPy's kernels take it."""

    ptr: int

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the version of the protocol, and the address."""
        return 0, self.ptr


_stream_at = lru_cache(maxsize=64)(_Stream)


class _Memory(NamedTuple):
    """A tensor's memory, in the protocol by which CuPy takes it: DLPack."""

    tensor: Tensor

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        # CuPy computes on torch's stream, so no stream has to wait.
        return self.tensor.__dlpack__(stream=-1, **options)


def _array(tensor: Tensor) -> Any:
    """Return a contiguous tensor's memory as a CuPy array.

    bfloat16 goes as its bits, which needs no such type on CuPy's side.
    """
    import cupy

    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return cupy.from_dlpack(_Memory(tensor))


def numpy_view(tensor: Tensor) -> Any:
    """Return a tensor's memory as an array, bfloat16 as its uint16 bits."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def lend_lookup(
    what: str,
    tensors: Mapping[str, Any],
    lookup: Lookup,
    scale: float = 1.0,
    volume: bool = False,
) -> None:
    """Lend tensors' memory to the CUDA engine of the lookup, which computes results into it.

    Parameters
    ----------
    what : {"cost", "grads", "pyramid", "pyramid_grads"}
        What is computed; see `cuda.lookup`.
    tensors : mapping of name to Tensor, list of Tensor, or None
        Inputs and results, on one CUDA device: for "cost" and "grads" those of `cuda.lookup.run`,
        else "fmap2" and "levels", or "grad_levels" and "grad_fmap2".
    lookup, scale
        As for `cuda.lookup.run`.
    volume : bool, default False
        Whether the tensors are those of `cuda.volume_lookup.run`.

    Raises
    ------
    RuntimeError
        As `lend`.
    """
    engine = _engine()
    like = tensors["fmap1"] if "fmap1" in tensors else next(iter(tensors.values()))
    like = like[0] if isinstance(like, list) else like
    index, cupy = like.get_device(), engine.cupy
    with torch.cuda.device(index), cupy.cuda.Device(index):
        stream = cupy.cuda.Stream.from_external(_stream_at(current_stream(index)))
        with stream:
            # Copies of what is not contiguous are held until all is launched.
            dense = {
                name: [_dense(tensor, not volume) for tensor in group] if isinstance(group, list)
                else None if group is None else _dense(group, "fmap" in name)
                for name, group in tensors.items()
            }  # fmt: skip
            arrays = convert_all(dense, _array)
            if volume:
                from cupycorr.cuda import volume_lookup

                volume_lookup.run(
                    what, arrays, lookup, dtype=_DTYPES[like.dtype], allocate=_allocator(like)
                )
                return
            from cupycorr.cuda import lookup as cuda_lookup

            cuda_lookup.run(
                what, arrays, lookup, scale, dtype=_DTYPES[like.dtype], allocate=_allocator(like)
            )


def _dense(tensor: Tensor, is_map: bool) -> Tensor:
    """Return a contiguous tensor, or a map whose channels lie side by side."""
    if tensor.is_contiguous() or (is_map and tensor.movedim(1, -1).is_contiguous()):
        return tensor
    return tensor.contiguous()
