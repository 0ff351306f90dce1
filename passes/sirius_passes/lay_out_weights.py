"""Stores each weight in the layout that its kernels stream; every path reads that one copy.

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

What reads a weight wants what it reads to be stored as rows: a neuron's for the MLPs' operators, an
input channel's for `sirius::sparse_linear`, a token's for an embedding. A linear alone is as fast
over a transposed view, so it follows the others; where linears are a weight's only readers, and all
read it transposed, it is stored so. One copy can't serve two that want different rows: that is
refused. Slices of a weight (fused projections) follow it: see `weight_views`.
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
            f"weight {name} is read both as it is, by {one}, and transposed, by {other}; one copy "
            "can't serve both. Open an issue with the model's config.json"
        )
    return bool(found) and all(reader.transposed for reader in list(strict.values()) or found)
