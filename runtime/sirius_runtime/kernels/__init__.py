"""Kernels of the `sirius::` operators. They do not read skipped weights; the references read them
and mask the products.
"""
