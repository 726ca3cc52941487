"""GPUs and layers that kernels are planned and compiled for, on machines without a GPU."""

from cupycorr import Geometry
from cupycorr.cuda.cost import Device


def _device(capability, multiprocessors, of_block, of_multiprocessor):
    """Describe a GPU; shared memory in KiB, at most, of a block and of a multiprocessor."""
    return Device(capability, multiprocessors, of_block << 10, of_multiprocessor << 10)


# One for each compute capability.
DEVICES = {
    "V100": _device(70, 80, 96, 96),
    "2070S": _device(75, 40, 64, 64),
    "A100": _device(80, 108, 163, 164),
    "3090": _device(86, 82, 99, 100),
    "4090": _device(89, 128, 99, 100),
    "H100": _device(90, 132, 227, 228),
    "B200": _device(100, 148, 227, 228),
    "5090": _device(120, 170, 99, 100),
}

#          name: ((N, C, H, W), geometry)
LAYERS = {
    "FlowNetC": ((4, 256, 48, 64), Geometry(patch_size=21, dilation_patch=2)),
    "PWC-Net 2": ((8, 32, 128, 224), Geometry(patch_size=9)),
    "PWC-Net 3": ((8, 64, 64, 112), Geometry(patch_size=9)),
    "PWC-Net 4": ((8, 96, 32, 56), Geometry(patch_size=9)),
    "PWC-Net 5": ((8, 128, 16, 28), Geometry(patch_size=9)),
    "PWC-Net 6": ((8, 196, 8, 14), Geometry(patch_size=9)),
    "DispNetC": ((4, 128, 96, 192), Geometry(patch_size=(1, 41))),
    # Of spatial-correlation-sampler's benchmark.py.
    "default": ((16, 64, 100, 100), Geometry(3, 3, 2, padding=1, dilation=2, dilation_patch=2)),
    # The stride divides no multiple of the spacing: positions advance by 3 columns.
    "stride 3": ((4, 64, 60, 80), Geometry(patch_size=7, stride=3, dilation_patch=2)),
}  # fmt: skip
