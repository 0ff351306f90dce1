"""The Triton kernels and their helpers. Shape letters as in `sirius_runtime.ops`.

No kernel uses atomic additions. Where several programs contribute to a sum, they write float32
partial sums, which a second kernel adds in a fixed order, so that equal calls are bit-equal.
"""
