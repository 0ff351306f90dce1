"""Triton kernels behind the `sirius::` operators on CUDA.

The modules that `available` imports when an operator is first called (`linear`, `mlp`,
`attention`) have functions of the operators' names, which allocate, choose tiles and launch;
`device` holds the kernels. Nothing on the host's side reads a value of the device, and no shape
depends on one, so that calls can be captured in a CUDA graph, once each has been called before.
"""
