"""The two functions of NVIDIA's extension ``correlation_cuda``, for a module that calls them.

With them a program's own copy of ``correlation_package/correlation.py`` works as it is. They know
nothing of autograd, and the gradients compute the cost volume once more: where the module can be
replaced as well, `cupycorr.compat.nvidia` is better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.compat.nvidia import CorrelationFunction


def forward(
    input1: Tensor,
    input2: Tensor,
    rbot1: Tensor,
    rbot2: Tensor,
    output: Tensor,
    pad_size: int,
    kernel_size: int,
    max_displacement: int,
    stride1: int,
    stride2: int,
    corr_multiply: int,
) -> int:
    """Compute the cost volume into ``output``, which takes its size; return 1.

    Parameters are those of `cupycorr.compat.nvidia.Correlation`; rbot1 and rbot2 are scratch
    memory there, and are not touched here.
    """
    function = CorrelationFunction(
        pad_size, kernel_size, max_displacement, stride1, stride2, corr_multiply
    )
    volume = function(input1, input2)
    output.resize_(volume.shape).copy_(volume)
    return 1


def backward(
    input1: Tensor,
    input2: Tensor,
    rbot1: Tensor,
    rbot2: Tensor,
    grad_output: Tensor,
    grad_input1: Tensor,
    grad_input2: Tensor,
    pad_size: int,
    kernel_size: int,
    max_displacement: int,
    stride1: int,
    stride2: int,
    corr_multiply: int,
) -> int:
    """Compute the gradients of both maps into ``grad_input1`` and ``grad_input2``; return 1."""
    function = CorrelationFunction(
        pad_size, kernel_size, max_displacement, stride1, stride2, corr_multiply
    )
    maps = [fmap.detach().requires_grad_() for fmap in (input1, input2)]
    with torch.enable_grad():
        grads = torch.autograd.grad(function(*maps), maps, grad_output)
    for result, grad in zip((grad_input1, grad_input2), grads, strict=True):
        result.resize_(grad.shape).copy_(grad)
    return 1
