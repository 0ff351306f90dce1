"""Triton kernels behind the `sirius::` operators on CUDA.

`available` imports `linear`, `mlp` and `attention` when an operator is first called. Their
functions have the operators' names; they allocate, choose tiles and launch the kernels of `device`.
The host never reads a value from the device, and no shape depends on one, so that calls can be
captured in a CUDA graph after a first call that compiles the kernel.
"""
