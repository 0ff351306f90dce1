"""Kernels behind the `sirius::` operators: what skips the reads that the references only mask."""
