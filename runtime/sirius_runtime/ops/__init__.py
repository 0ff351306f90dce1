"""The `sirius::` operators in plain PyTorch: each one's reference, fake (shapes only) and rule.

The table of all operators is `sirius_runtime.operators`. Shape letters in all these modules: `B`
rows, `T` tokens of the call, `M` block slots, `S` cache slots, `H` query heads, `G` key/value
heads, `D` head dim, `C` hidden size, `I` neurons of an MLP, `K` kept neurons, `O` output features
of a linear; in a mixture, `N` tokens of all rows, `E` experts, `k` experts of a token.
"""
