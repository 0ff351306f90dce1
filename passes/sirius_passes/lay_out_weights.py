"""Stores each weight in the layout that its kernels stream; every path reads that one copy.

    Before                                           After
    weight %down: model[192, 768]                    weight %down: model[768, 192]
    %1 = aten.t(%down)                               %1 = sirius.dense_mlp(%x, %gate, %up, %down, …)
    %2 = sirius.dense_mlp(%x, %gate, %up, %1, …)

A weight that every graph reads transposed, and only so, is stored transposed, and the transposes
go. A weight that is read both ways is refused: one copy could not serve both.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from sirius_passes.manager import Pass
from sirius_passes.program import Program, Stage
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.graph import WEIGHT, placeholders

aten = torch.ops.aten


class LayOutWeights(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "lay_out_weights"
    takes: ClassVar[Stage] = Stage.PAIRED
    gives: ClassVar[Stage] = Stage.LAID_OUT

    def run(self, program: Program) -> int:
        count = 0
        for name, spec in list(program.weights.items()):
            readers = [
                (node, user)
                for module in program.graphs.values()
                if (node := placeholders(module.graph, WEIGHT).get(name)) is not None
                for user in node.users
            ]
            transposed = [user.target is aten.t.default for _, user in readers]
            if any(transposed) and not all(transposed):
                raise UnsupportedModelError(
                    f"weight {name} is read both transposed and as it is; one copy can't serve "
                    "both. Open an issue with the model's config.json"
                )
            if not any(transposed):
                continue
            for node, user in readers:
                user.replace_all_uses_with(node)
                node.graph.erase_node(user)
                with node.meta["val"].fake_mode:
                    node.meta["val"] = torch.empty(spec.shape[::-1], dtype=node.meta["val"].dtype)
            program.update_weight(name, shape=spec.shape[::-1], transposed=not spec.transposed)
            count += 1
        for module in program.graphs.values():
            module.recompile()
        return count
