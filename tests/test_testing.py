"""The pass checker: each broken rule of a pass is found, with its own message."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, fx

from sirius_passes.canonicalize import Canonicalize
from sirius_passes.insert_kv_cache import InsertKvCache
from sirius_passes.manager import Pass
from sirius_passes.pair_paths import PairPaths
from sirius_passes.program import DENSE, FULL, PREFILL, SPARSE, Program, Stage, call, calls
from sirius_passes.sparsify_topk import SparsifyTopk
from sirius_passes.testing import check_pass, random_weights, run_graph, snapshot
from sirius_runtime.errors import UnsupportedModelError
from tests.support.graphs import Attention, Decoder, Mlp, after, one_mlp, paired, trace, two_layers

aten, sirius = torch.ops.aten, torch.ops.sirius


class Rewrite(Pass):
    """Applies `replace` to each silu, and reports `reported` rewrites."""

    name = "rewrite"
    takes = gives = Stage.CANONICAL

    def __init__(self, replace: Callable[[fx.Node], fx.Node], reported: int | None = None) -> None:
        self.replace, self.reported = replace, reported

    def run(self, program: Program) -> int:
        found = [n for m in program.graphs.values() for n in calls(m.graph, aten.silu.default)]
        for node in found:
            with node.graph.inserting_before(node):
                node.replace_all_uses_with(self.replace(node))
            node.graph.erase_node(node)
        return len(found) if self.reported is None else self.reported


def by_sigmoid(node: fx.Node) -> fx.Node:
    sigmoid = call(node.graph, aten.sigmoid.default, node.args, origin="rewrite")
    return call(node.graph, aten.mul.Tensor, (node.args[0], sigmoid), origin="rewrite")


def canonical() -> Program:
    return after(lambda: Decoder(Mlp(), Mlp()), Canonicalize())


def fails(step: Pass, message: str, program: Program | None = None, **options: object) -> None:
    with pytest.raises(AssertionError, match=message):
        check_pass(program or canonical(), step, **options)


def test_a_sound_pass_passes_and_what_it_did_is_returned() -> None:
    expect = {"aten.silu": (2, 0), "dense/aten.sigmoid": (0, 2), "aten.linear": (7, 7)}
    program = canonical()
    check = check_pass(program, Rewrite(by_sigmoid), expect=expect)
    assert check.rewrites == 2
    assert check.before[DENSE]["aten.silu"] == check.after[DENSE]["aten.sigmoid"] == 2
    assert 0 < check.differences["dense.logits"] < 1e-5
    assert "aten.sigmoid" in snapshot(program.graphs[DENSE])


def test_nothing_to_do_passes() -> None:
    check = check_pass(after(Decoder, Canonicalize()), Rewrite(by_sigmoid))
    assert (check.rewrites, check.before) == (0, check.after)


def test_the_marks_of_the_check_do_not_stay_behind() -> None:
    program = canonical()
    keys = {key for node in program.graphs[DENSE].graph.nodes for key in node.meta}
    check_pass(program, Rewrite(by_sigmoid))
    now = {key for node in program.graphs[DENSE].graph.nodes for key in node.meta}
    assert now - keys == {"origin"}


def test_a_stage_that_does_not_fit() -> None:
    fails(Rewrite(by_sigmoid), "takes stage CANONICAL, but the program is at", trace(Decoder))


def test_a_broken_invariant() -> None:
    def with_dead_node(node: fx.Node) -> fx.Node:
        call(node.graph, aten.neg.default, node.args, origin="rewrite")
        return by_sigmoid(node)

    fails(Rewrite(with_dead_node), "after rewrite: graph 'dense' .* is dead")


def test_op_counts() -> None:
    step = Rewrite(by_sigmoid)
    fails(step, "aten.sigmoid: 0 calls before and 2 after, exp", expect={"aten.sigmoid": (0, 1)})
    fails(step, "dense/aten.silu: 2 calls before and 0", expect={"dense/aten.silu": (2, 2)})


def test_a_value_of_another_shape() -> None:
    def wrong(node: fx.Node) -> fx.Node:
        replacement = by_sigmoid(node)
        replacement.meta["val"] = replacement.meta["val"][..., :1]
        return replacement

    fails(Rewrite(wrong), r"aten.mul.*meta\['val'\] is .*, recomputed it is")


def test_a_value_of_another_dtype() -> None:
    def wrong(node: fx.Node) -> fx.Node:
        replacement = by_sigmoid(node)
        replacement.meta["val"] = replacement.meta["val"].float()
        return replacement

    fails(Rewrite(wrong), r"aten.mul.*meta\['val'\] is .*, recomputed it is .*bfloat16")


def test_a_node_of_unknown_origin() -> None:
    def wrong(node: fx.Node) -> fx.Node:
        replacement = by_sigmoid(node)
        del replacement.meta["origin"]
        return replacement

    fails(Rewrite(wrong), r"aten.mul.*a new node without meta\['origin'\]")


def test_other_numbers() -> None:
    def wrong(node: fx.Node) -> fx.Node:
        return call(node.graph, aten.relu.default, node.args, origin="rewrite")

    fails(Rewrite(wrong), r"dense\.logits of the prompts: Tensor-likes are not close")


def test_tolerances_are_the_caller_s() -> None:
    fails(Rewrite(by_sigmoid), r"dense\.logits", rtol=0.0, atol=0.0)


def test_a_wrong_count_of_rewrites() -> None:
    fails(Rewrite(by_sigmoid, reported=0), "reports 0 rewrites, but the program is changed")
    nothing = Rewrite(lambda node: call(node.graph, aten.silu.default, node.args, origin="x"))
    fails(nothing, "reports 2 rewrites, but the program is as before")


def test_a_pass_that_never_ends() -> None:
    def again(node: fx.Node) -> fx.Node:
        by = by_sigmoid(node)
        zero = call(node.graph, aten.sub.Tensor, (by, by), origin="x")
        one_more = call(node.graph, aten.silu.default, (zero,), origin="x")
        return call(node.graph, aten.add.Tensor, (by, one_more), origin="x")

    fails(Rewrite(again), "rewrite, run again on its own output, made 2 rewrites")


def test_a_refusal_passes_through() -> None:
    class Refuses(Rewrite):
        def run(self, program: Program) -> int:
            raise UnsupportedModelError("no such thing")

    with pytest.raises(UnsupportedModelError, match="no such thing"):
        check_pass(canonical(), Refuses(by_sigmoid))


# what the calls reach: wirings of the cache that only some calls tell apart


class Rewire(Pass):
    """insert_kv_cache with a bug: one argument of the operator is replaced afterwards."""

    name = "rewire"
    takes, gives = Stage.CANONICAL, Stage.CACHED

    def __init__(self, **exchanged: str) -> None:
        self.exchanged = exchanged

    def run(self, program: Program) -> int:
        count = InsertKvCache().run(program)
        for node in calls(program.graphs[DENSE].graph, sirius.cached_attention.default):
            by_name = {n.name: n for n in node.graph.nodes if n.op == "placeholder"}
            node.args = tuple(
                by_name[self.exchanged[a.name]]
                if isinstance(a, fx.Node) and a.name in self.exchanged
                else a
                for a in node.args
            )
        return count


@pytest.mark.parametrize("window", [None, 2])
def test_slots_that_are_positions_fail_in_a_tree(window: int | None) -> None:
    program = after(lambda: Decoder(Attention(0, window)), Canonicalize())
    fails(Rewire(slots="positions"), r"dense\.logits of a tree", program)


def test_positions_that_are_slots_fail_in_a_tree_with_a_window() -> None:
    program = after(lambda: Decoder(Attention(0, 3)), Canonicalize())
    fails(Rewire(positions="slots"), r"dense\.logits of a tree", program)


# reference


def reference_of_relu(
    name: str, before: fx.GraphModule, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    assert name == DENSE
    for node in calls(before.graph, aten.silu.default):
        node.target = aten.relu.default
    return run_graph(before, inputs, weights)


def test_a_reference_says_what_is_expected_instead() -> None:
    def relu(node: fx.Node) -> fx.Node:
        return call(node.graph, aten.relu.default, node.args, origin="rewrite")

    check_pass(canonical(), Rewrite(relu), reference=reference_of_relu)
    fails(Rewrite(by_sigmoid), r"dense\.logits of the prompts", reference=reference_of_relu)


def test_a_reference_for_what_the_graph_does_not_give() -> None:
    program, kept = paired(one_mlp), {"kept": torch.zeros(1)}
    fails(SparsifyTopk(1.0), r"has no outputs \['kept'\]", program, reference=lambda *_: kept)


def test_a_reference_of_nothing_compares_nothing() -> None:
    program = paired(one_mlp)
    fails(SparsifyTopk(1.0), "nothing to compare", program, reference=lambda *_: {})


def test_new_graphs_are_held_against_the_dense_one() -> None:
    class SparseIsWrong(PairPaths):
        def run(self, program: Program) -> int:
            rewrites = super().run(program)
            for module in (program.graphs[SPARSE],) if rewrites else ():
                for node in calls(module.graph, aten.silu.default):
                    node.target = aten.relu.default
            return rewrites

    program = after(two_layers, Canonicalize(), InsertKvCache())
    fails(SparseIsWrong(), r"sparse\.logits of the prompts", program)


# run_graph, random_weights, snapshot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_run_graph_computes_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    program = trace(one_mlp)
    weights = random_weights(program, seed=1, dtype=dtype)
    inputs = {"input_ids": torch.tensor([[3, 1, 4]]), "positions": torch.tensor([[0, 1, 2]])}
    outputs = run_graph(program.graphs[DENSE], inputs, weights, dtype)
    x = weights["embed.weight"][inputs["input_ids"]] + weights["place.weight"][:3]
    gate, up, down = (weights[f"layers.0.{name}.weight"] for name in ("gate", "up", "down"))
    x = x + torch.nn.functional.silu(x @ gate.t()) * (x @ up.t()) @ down.t()
    assert outputs.keys() == {"logits"}
    assert outputs["logits"].dtype is dtype
    torch.testing.assert_close(outputs["logits"], x @ weights["head.weight"].t())


def test_random_weights_depend_on_the_seed_and_the_name_alone() -> None:
    one, two = trace(one_mlp), trace(lambda: Decoder(Mlp(), Mlp()))
    first, again, other = (random_weights(p, s) for p, s in ((one, 0), (two, 0), (one, 1)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["layers.0.gate.weight"], first["layers.0.up.weight"])


def test_random_weights_follow_the_program_s_dtype_where_the_table_says_so() -> None:
    program = trace(Decoder)
    program.update_weight("place.weight", dtype="float32", retype=False)
    program.update_weight("head.weight", dtype="int64", retype=False)
    weights = random_weights(program, seed=0, dtype=torch.bfloat16)
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    assert dtypes == {
        "embed.weight": torch.bfloat16,
        "place.weight": torch.float32,
        "head.weight": torch.int64,
    }


def test_snapshots_of_two_traces_agree() -> None:
    one, two = paired(two_layers), paired(two_layers)
    for name in (PREFILL, SPARSE, FULL):
        assert snapshot(one.graphs[name]) == snapshot(two.graphs[name])
