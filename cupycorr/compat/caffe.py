"""The correlation layers of FlowNet's and FlowNet2's Caffe, for flow and for stereo."""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.compat import systems
from cupycorr.compat.channels import correlate_channels


class Correlation(torch.nn.Module):
    """FlowNet's correlation layer, with the parameters of a prototxt's ``correlation_param``.

    Parameters
    ----------
    kernel_size : int
        Taps per axis; odd.
    max_displacement : int, pixels
        Largest displacement; output positions keep this distance from the padded border.
    pad : int, pixels, default 0
        Zeros around both maps.
    stride_1, stride_2 : int, pixels, default 1
        Step between output positions, and between displacements.
    do_abs : bool, default False
        Must be False: the original reads it from the prototxt and does not use it.
    correlation_type : {"multiply", "subtract", 0, 1}, default "multiply"
        The mean of products, or of absolute differences; in upper case too, or the number of the
        prototxt's enum.

    Raises
    ------
    TypeError, ValueError
        As `Geometry.from_flownet`, in whose words ``pad`` is pad_size; ValueError also for an even
        kernel_size, which the original refuses too, for do_abs, and for another correlation_type.

    Notes
    -----
    For "multiply" the definition is that of `cupycorr.compat.nvidia.Correlation`, with the names
    ``pad, stride_1, stride_2`` for ``pad_size, stride1, stride2``. "subtract" has
    ``abs(a - b)`` in place of ``a * b``, with zeros outside the maps; its gradients are those of
    `cupycorr.correlation` with similarity "l1" (the original's compare other positions).
    """

    def __init__(
        self,
        kernel_size: int,
        max_displacement: int,
        pad: int = 0,
        stride_1: int = 1,
        stride_2: int = 1,
        do_abs: bool = False,
        correlation_type: str | int = "multiply",
    ) -> None:
        super().__init__()
        if do_abs:
            raise ValueError(
                f"do_abs must be False, got {do_abs!r}: the Caffe layer does not use it; take "
                "absolute values of the result with .abs()"
            )
        self.layer = systems.caffe(
            kernel_size, max_displacement, pad, stride_1, stride_2, correlation_type
        )

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Compute the cost volume of two feature maps.

        Parameters
        ----------
        input1, input2 : Tensor (N, C, H, W), float16|bfloat16|float32|float64
            The feature maps, of any strides.

        Returns
        -------
        Tensor (N, L, OH, OW)
            One channel per displacement, rows of displacements outermost.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.correlation`.
        """
        volume: Tensor = correlate_channels(input1, input2, self.layer, names=("input1", "input2"))
        return volume

    def extra_repr(self) -> str:
        """Return what is computed, in cupycorr's words."""
        return f"{self.layer.geometry!r}, similarity={self.layer.similarity!r}"


class Correlation1D(Correlation):
    """FlowNet2's correlation layer for stereo: displacements and padding are horizontal.

    Parameters
    ----------
    kernel_size, max_displacement, pad, stride_1, stride_2, do_abs, correlation_type
        As `Correlation`.
    single_direction : {-1, 0, 1}, default 0
        Only displacements <= 0, all of them, or only those >= 0.

    Raises
    ------
    TypeError, ValueError
        As `Correlation`; ValueError also for another single_direction.

    Notes
    -----
    The ``(1 if single_direction else 2) * radius + 1`` channels are displacements in ascending
    order, with ``radius = max_displacement // stride_2``, and the size is::

        OH = ceil((H - 2 * ((kernel_size - 1) // 2)) / stride_1)
        OW = ceil((W + 2 * pad - 2 * (max_displacement + (kernel_size - 1) // 2)) / stride_1)

    FlowNet2's code for direction -1 shifts all displacements by one more step than its parameters
    say, from ``-(radius + 1) * stride_2`` to ``-stride_2``, so that 0 is missing and memory before
    a row is read where ``pad`` is ``max_displacement``. Weights trained with that want
    ``Geometry(patch_size=(1, radius + 1), first_displacement=(0, -(radius + 1)))``, at stride_2 1.
    """

    def __init__(
        self,
        kernel_size: int,
        max_displacement: int,
        pad: int = 0,
        stride_1: int = 1,
        stride_2: int = 1,
        do_abs: bool = False,
        correlation_type: str | int = "multiply",
        single_direction: int = 0,
    ) -> None:
        super().__init__(
            kernel_size, max_displacement, pad, stride_1, stride_2, do_abs, correlation_type
        )
        self.layer = systems.caffe(
            kernel_size, max_displacement, pad, stride_1, stride_2, correlation_type,
            single_direction,
        )  # fmt: skip
