"""The `sirius::` operators: schema, fake (shapes only) and plain-PyTorch reference of each.

Importing this package registers them with torch; `sirius_runtime.operators` puts the kernels behind
them. Shape letters in all its modules: `B` rows,
`T` tokens of the call, `M` block slots, `S` cache slots, `H` query heads, `G` key/value heads, `D`
head dim, `C` hidden size, `I` neurons of an MLP, `K` kept neurons, `O` output features of a linear;
in a mixture, `N` tokens of all rows, `E` experts, `k` of a token.
"""

from __future__ import annotations

from sirius_runtime.ops import attention, linear, mlp, moe

__all__ = ["attention", "linear", "mlp", "moe"]
