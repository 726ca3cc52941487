"""The CUDA engine: plans, tiles, and kernels that NVRTC compiles at run time."""
