"""Makes attention read and write a key/value cache: one graph for prefill, chain and tree.

    Before                                     After
    input input_ids, positions                 input …, slots, length, tree_mask, k_cache, v_cache
    %1 = sirius.attention(%q, %k, %v,          %1 = sirius.cached_attention(%q, %k, %v,
             0, 0.25, None, None)                %k_cache, %v_cache, %positions, %slots,
                                                 %length, %tree_mask, 0, 0.25, None, None)

Shapes as in `sirius_runtime.ops.attention`. The operator writes the caches in place.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from sirius_passes.manager import Pass
from sirius_passes.program import Program, Stage, add_input, call, calls

sirius = torch.ops.sirius


class InsertKvCache(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "insert_kv_cache"
    takes: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CACHED

    def run(self, program: Program) -> int:
        count = 0
        for module in program.graphs.values():
            graph = module.graph
            state = [
                add_input(graph, name)
                for name in ("positions", "slots", "length", "tree_mask", "k_cache", "v_cache")
            ]
            positions, slots, length, tree_mask, k_cache, v_cache = state
            for node in calls(graph, sirius.attention.default):
                q, k, v, *kind = node.args
                with graph.inserting_before(node):
                    cached = call(
                        graph,
                        sirius.cached_attention.default,
                        (q, k, v, k_cache, v_cache, positions, slots, length, tree_mask, *kind),
                        origin=f"insert_kv_cache({node.name})",
                    )
                node.replace_all_uses_with(cached)
                graph.erase_node(node)
                count += 1
            module.recompile()
        return count
