"""Kernels behind the `sirius::` operators: they skip weight reads that the references only mask."""
