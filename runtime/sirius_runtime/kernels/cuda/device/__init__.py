"""The Triton kernels, and what they share. Shape letters as in `sirius_runtime.ops`.

No kernel adds by atomics: what several programs add to is written as float32 partial sums, which a
second kernel adds up in a fixed order, so that the same call gives the same bits.
"""
