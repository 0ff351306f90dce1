"""Stores each weight in the layout that its kernels read; all paths share that copy.

    Before                                           After
    weight %down: model[192, 768]                    weight %down: model[768, 192]
    %1 = aten.t(%down)                               %1 = sirius.dense_mlp(%x, %gate, %up, %down, …)
    %2 = sirius.dense_mlp(%x, %gate, %up, %1, …)

    weight %up: model[768, 192]                      weight %up: model[192, 768]
    full
    %1 = aten.linear(%x, %up)                        %1 = aten.t(%up)
                                                     %2 = aten.linear(%x, %1)
    sparse
    %1 = aten.t(%up)
    %2 = sirius.sparse_linear(%x, %1, …)             %1 = sirius.sparse_linear(%x, %up, …)

A reader of a weight needs contiguous rows: a neuron a row for the MLP operators, an input channel a
row for `sirius::sparse_linear`, a token a row for an embedding. A dense linear is as fast over a
transposed view, so it accepts either layout. If only dense linears read a weight, and all of them
read its transpose, it is stored transposed. A weight is stored once, so the pass refuses readers
that need different layouts of it. Slices of a weight (fused projections) follow its layout: see
`weight_views`.
"""

from __future__ import annotations

from typing import ClassVar

from sirius_passes.manager import Pass
from sirius_passes.program import Program, Stage
from sirius_passes.weight_views import Reader, readers, store_transposed, transposed_shape
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.graph import WEIGHT, placeholders


class LayOutWeights(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "lay_out_weights"
    takes: ClassVar[Stage] = Stage.PAIRED
    gives: ClassVar[Stage] = Stage.LAID_OUT

    def run(self, program: Program) -> int:
        count = 0
        bound = [placeholders(module.graph, WEIGHT) for module in program.graphs.values()]
        for name, spec in list(program.weights.items()):
            placed = [nodes[name] for nodes in bound if name in nodes]
            if not _wants_transposed(name, [r for node in placed for r in readers(node)]):
                continue
            for node in placed:
                store_transposed(node, self.name)
            program.update_weight(
                name, shape=transposed_shape(spec.shape), transposed=not spec.transposed
            )
            count += 1
        for module in program.graphs.values():
            module.recompile()
        return count


def _wants_transposed(name: str, found: list[Reader]) -> bool:
    strict = {reader.transposed: reader for reader in found if not reader.takes_views}
    if len(strict) == 2:
        one, other = (f"{r.node.name} ({r.node.target})" for _, r in sorted(strict.items()))
        raise UnsupportedModelError(
            f"weight {name} is read as stored by {one} and transposed by {other}; it is stored "
            "once, so it can't serve both. Please open an issue with the model's config.json"
        )
    return bool(found) and all(reader.transposed for reader in list(strict.values()) or found)
