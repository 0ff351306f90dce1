"""Builds one graph of a whole period: draft, verify, accept, compact the KV cache and roll back.

    Before                  After
    prefill, sparse, full   prefill, sparse, full, and period:

    period(root, active, most, length, k_cache, v_cache, rule, …, weights)
        %tree, %block = …                                   # the root alone
        while %level < K and any row is live:               # higher_order.while_loop
            %logits, %block = sparse(nodes of %level, %block)
            %tree = attach(propose(%tree, %logits))         # higher_order.cond: sampled or greedy
        %logits, %block = full(%tree[: n])                  # only the levels that were drafted
        %tokens, %advance, %root, %nodes = judge(%tree, %logits)
        return tokens, advance, root, length, k_kept, v_kept, …

State is passed in and returned; nothing is mutated. The caches are only read
(`sirius.block_attention` replaces `sirius.cached_attention`), and the loop carries the K/V of the
draft block. The graph returns the accepted path's K/V [layers, B, G, K, D], in path order; once a
period, the runtime writes them to the slots after `length`. Returning the whole caches would copy
them for these few slots.

Drafting and acceptance are traced from the functions that `by_entries` calls
(`sirius_runtime.drafting`, `.policy`, `.tree`), with the same shapes. K and w are static, rows B
and cache slots S are symbolic.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from sirius_passes.manager import Pass
from sirius_passes.program import (
    FULL,
    INPUTS,
    OBSERVE,
    ORIGIN,
    OUTPUTS,
    PERIOD,
    RESULTS,
    SPARSE,
    Program,
    Stage,
    add_input,
    call,
    calls,
    copy_graph,
    outputs,
    set_outputs,
    subgraphs,
)
from sirius_passes.traced_rules import TracedRules
from sirius_passes.tracing import one_at_a_time
from sirius_runtime.drafting import DraftState, begin, extend
from sirius_runtime.entries import plan_inputs
from sirius_runtime.graph import CAPTURE_DTYPE, INPUT, WEIGHT, placeholders
from sirius_runtime.policy import Verdict, judge, observed, select_neurons
from sirius_runtime.rules import RULES
from sirius_runtime.sizes import node_count
from sirius_runtime.tree import Tree, beams

aten, sirius = torch.ops.aten, torch.ops.sirius
higher_order = torch.ops.higher_order


class BuildPeriod(Pass):
    """`period`: K, the levels of a tree with its root. `width`: w, the nodes of a level.
    `max_seq_len`: the most tokens of a sequence.
    """

    name: ClassVar[str] = "build_period"
    takes: ClassVar[Stage] = Stage.LAID_OUT
    gives: ClassVar[Stage] = Stage.FINAL

    def __init__(self, period: int, width: int, max_seq_len: int) -> None:
        self.period, self.width, self.max_seq_len = period, width, max_seq_len

    def run(self, program: Program) -> int:
        if PERIOD in program.graphs:
            return 0
        program.graphs[PERIOD] = _Builder(self, program).build()
        return 1


class _Builder:
    def __init__(self, options: BuildPeriod, program: Program) -> None:
        self.period, self.width = options.period, options.width
        self.last_position = options.max_seq_len - 1
        self.program = program
        self.refreshes = program.sparsity.method.per_prompt
        full = OBSERVE if self.refreshes else FULL
        self.sparse = _Functional(program.graphs[SPARSE])
        self.full = _Functional(program.graphs[full])
        read = (placeholders(program.graphs[name].graph, WEIGHT) for name in (full, SPARSE))
        self.placed = {name: node for nodes in read for name, node in nodes.items()}
        self.weights = list(self.placed)
        self.inputs = [
            *("root", "active", "most", "length", "k_cache", "v_cache"),
            *plan_inputs(tuple(RULES)),
            *("neurons", "statistic", "refresh") * self.refreshes,
        ]

    @one_at_a_time  # `_CALLED` is global
    def build(self) -> fx.GraphModule:
        order = self.inputs + self.weights
        names: tuple[str, ...] = ()

        def traced(*flat: Tensor) -> tuple[Tensor, ...]:
            nonlocal names
            results = self.body(dict(zip(order, flat, strict=True)))
            names = tuple(results)
            return tuple(results.values())

        # The entries' symbolic sizes don't apply here, so the period has its own fake mode.
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            values = _fake_inputs(self.inputs, self.program, self.period)
            for name, node in self.placed.items():
                value = node.meta["val"]
                values[name] = torch.empty(value.shape, dtype=value.dtype)
            module = make_fx(traced, pre_dispatch=True)(*(values[name] for name in order))
        for part in (module, *subgraphs(module)):
            with mode:
                _inline(part)
            part.graph.eliminate_dead_code()
            part.recompile()
        _CALLED.clear()
        for name, node in zip(order, module.graph.find_nodes(op="placeholder"), strict=True):
            node.meta[INPUT if name in INPUTS else WEIGHT] = name
        module.graph.output_node().meta[OUTPUTS] = names
        return module

    def body(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """One period as a function of tensors; `given` has the inputs and weights by name."""
        period, width = self.period, self.width
        length, k_cache = given["length"], given["k_cache"]
        vocabulary = self.sparse.vocabulary if width == 1 else None
        state = begin(
            given["root"],
            given["active"],
            given["most"],
            period=period,
            width=width,
            sampled_from=vocabulary,
        )
        N = node_count(period, width)
        k_block, v_block = (
            cache.new_zeros(*cache.shape[:3], N, cache.shape[4])
            for cache in (k_cache, given["v_cache"])
        )
        level = torch.ones_like(length[0])
        carry = _Carry(level, state, k_block, v_block, self._no_counts(k_cache))
        if width > 1 and period > 1:  # level 1 grows from one node, the others from w
            carry = self._step(carry, given, count=1)
        if period > (1 if width == 1 else 2):
            carry = self._draft(carry, given)
        return self._finish(carry, given)

    def _no_counts(self, k_cache: Tensor) -> Tensor | None:
        if "kept" not in self.sparse.outputs:
            return None
        sites = len(self.program.sparsity.counted)
        return torch.zeros(sites, k_cache.shape[1], dtype=torch.int64, device=k_cache.device)

    def _draft(self, carry: _Carry, given: dict[str, Tensor]) -> _Carry:
        """Drafts one level after another, until the last level or until no row is live."""
        flat, names = carry.flatten(), list(given)

        def goes_on(*values: Tensor) -> Tensor:
            now = carry.unflatten(values[: len(flat)])
            # Level 1 is always drafted: without it, verification would have a different shape.
            return (now.level < self.period) & (now.state.live.any() | (now.level == 1))

        def step(*values: Tensor) -> tuple[Tensor, ...]:
            now = carry.unflatten(values[: len(flat)])
            inside = dict(zip(names, values[len(flat) :], strict=True))
            return self._step(now, inside, count=self.width).flatten()

        looped = higher_order.while_loop(goes_on, step, flat, tuple(given.values()))
        return carry.unflatten(looped)

    def _step(self, carry: _Carry, given: dict[str, Tensor], count: int) -> _Carry:
        """Drafts one level, by one sparse step over the `count` nodes of the level above."""
        level, state = carry.level, carry.state
        nodes = beams(level - 1, self.width, count)
        result = self._run(self.sparse, given, carry, state.tree, nodes)
        rules = TracedRules(given, self.period, self.width)
        grown = extend(
            state,
            result["logits"],
            level,
            rules.propose,
            given["most"],
            given["confidence"],
        )
        kept = carry.kept
        if kept is not None:
            kept = kept + result["kept"] * state.live
        return _Carry(level + 1, grown, result["k_block"], result["v_block"], kept)

    def _run(
        self,
        entry: _Functional,
        given: dict[str, Tensor],
        carry: _Carry,
        tree: Tree,
        nodes: Tensor,
    ) -> dict[str, Tensor]:
        """Runs an entry's functional form over these nodes [T] of every row's tree."""
        depth = tree.depth.index_select(1, nodes).clamp(min=0)
        return entry(
            given
            | {
                "input_ids": tree.tokens.index_select(1, nodes),
                "positions": (given["length"][:, None] + depth).clamp(max=self.last_position),
                "nodes": nodes,
                "tree_mask": tree.mask.index_select(1, nodes),
                "k_block": carry.k_block,
                "v_block": carry.v_block,
            }
        )

    def _finish(self, carry: _Carry, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Verifies the drafted levels, accepts, and gathers the accepted path's K/V."""
        period, draft = self.period, carry.state.draft
        levels: Any = 0
        if period > 1:
            levels = (carry.level - 1).item()
            # Compilers refuse a size that is read from a tensor unless its range is known.
            aten.sym_constrain_range.default(levels, min=1, max=period - 1)
        nodes = torch.arange(levels * self.width + 1, device=carry.level.device)
        result = self._run(self.full, given, carry, draft.tree, nodes)
        # Padded to a static size with zeros for the nodes not drafted, which nothing reads.
        logits = result["logits"]
        B, _, V = logits.shape
        padded = logits.new_zeros(B, draft.tree.tokens.shape[1], V).index_copy(1, nodes, logits)
        rules = TracedRules(given, period, self.width)
        verdict = judge(draft, padded, rules.decide, given["most"], period)
        active, length = given["active"], given["length"]
        found = {
            "tokens": verdict.tokens,
            "advance": verdict.advance,
            "drafted": draft.depth,
            "root": torch.where(active, verdict.root, given["root"]),
            "length": length + verdict.advance * active,
            "levels": carry.level - 1,
        }
        for kept, block in (("k_kept", "k_block"), ("v_kept", "v_block")):
            found[kept] = _kept(result[block], verdict.nodes)
        if carry.kept is not None:
            found["kept"] = carry.kept
        if self.refreshes:
            found |= _refreshed(given, result["activity"], verdict)
        return found


class _Carry(NamedTuple):
    """The values that the draft loop carries.

    `level`: the next level to draft. `kept` [sites, B]: units kept so far at each counted site;
    None if there are no counted sites, as every token keeps the same number.
    """

    level: Tensor
    state: DraftState
    k_block: Tensor
    v_block: Tensor
    kept: Tensor | None

    def flatten(self) -> tuple[Tensor, ...]:
        return tuple(t for t in pytree.tree_leaves(self) if t is not None)

    def unflatten(self, values: Sequence[Tensor]) -> _Carry:
        """`values` in the form of this carry."""
        remaining = iter(values)
        return pytree.tree_map(lambda leaf: None if leaf is None else next(remaining), self)


class _Functional:
    """An entry in functional form: it takes and returns the block's K/V, and mutates nothing."""

    def __init__(self, module: fx.GraphModule) -> None:
        module = copy_graph(module)
        graph = module.graph
        names = ("k_block", "v_block", "nodes")
        k_block, v_block, nodes = (add_input(graph, name) for name in names)
        blocks: tuple[list[fx.Node], list[fx.Node]] = ([], [])
        for node in calls(graph, sirius.cached_attention.default):
            q, k, v, k_cache, v_cache, positions, _slots, length, tree_mask, *kind = node.args
            with graph.inserting_before(node):
                args: tuple[Any, ...] = (q, k, v, k_cache, v_cache, k_block, v_block)
                args += (positions, nodes, length, tree_mask, *kind)
                result = _call(graph, sirius.block_attention.default, args)
                out, *new = (_call(graph, operator.getitem, (result, i)) for i in range(3))
            node.replace_all_uses_with(out)
            graph.erase_node(node)
            for block, value in zip(blocks, new, strict=True):
                block.append(value)
        values = outputs(graph)
        with graph.inserting_before(graph.output_node()):
            for name, block in zip(names, blocks, strict=False):
                values[name] = _call(graph, aten.stack.default, (block,))
        set_outputs(graph, values)
        for node in list(placeholders(graph, INPUT).values()):
            if not node.users:
                graph.erase_node(node)
        module.recompile()
        self.graph = graph
        self._arguments = [
            node.meta.get(INPUT) or node.meta[WEIGHT] for node in graph.find_nodes(op="placeholder")
        ]
        self.outputs = tuple(values)
        self.vocabulary = int(values["logits"].meta["val"].shape[-1])

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Traces the entry as one node, which `_inline` later replaces by the entry's nodes."""
        _CALLED[id(self)] = self
        results = _entry([given[name] for name in self._arguments], id(self))
        return dict(zip(self.outputs, results, strict=True))

    def empty_outputs(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Uninitialised tensors with the shapes and dtypes of the entry's outputs."""
        given = dict(zip(self._arguments, arguments, strict=True))
        extents: dict[str, Any] = {"V": self.vocabulary}
        for name, value in given.items():
            if name in INPUTS:
                extents |= zip(map(str, INPUTS[name].shape), value.shape, strict=True)
        values = []
        for name, node in outputs(self.graph).items():
            value, spec = node.meta["val"], RESULTS[name]
            pairs = zip(map(str, spec.shape), value.shape, strict=True)
            shape = [extents.get(letter, extent) for letter, extent in pairs]
            values.append(arguments[0].new_empty(shape, dtype=value.dtype))
        return values


_CALLED: dict[int, _Functional] = {}
"""The entries that the trace in progress calls."""


@torch.library.custom_op("sirius_passes::entry", mutates_args=())
def _entry(arguments: list[Tensor], called: int) -> list[Tensor]:
    raise NotImplementedError("a placeholder for an entry while a period is traced; never run")


@_entry.register_fake
def _(arguments: list[Tensor], called: int) -> list[Tensor]:
    return _CALLED[called].empty_outputs(arguments)


def _inline(module: fx.GraphModule) -> None:
    """Replaces each node that `_Functional` traced by the nodes of its entry."""
    for node in calls(module.graph, torch.ops.sirius_passes.entry.default):
        arguments: Any = node.args[0]
        called: Any = node.args[1]
        entry = _CALLED[called].graph
        env = dict(zip(entry.find_nodes(op="placeholder"), arguments, strict=True))
        with module.graph.inserting_before(node):
            for inner in entry.nodes:
                if inner.op not in ("placeholder", "output"):
                    copy = env[inner] = module.graph.node_copy(inner, env.__getitem__)
                    # Fake values are recomputed with the period's symbolic sizes.
                    args, kwargs = fx.node.map_arg((copy.args, copy.kwargs), _value)
                    copy.meta = {"val": inner.target(*args, **kwargs), ORIGIN: inner.name}
        returned = list(outputs(entry).values())
        for user in list(node.users):
            assert user.target is operator.getitem
            index: Any = user.args[1]
            user.replace_all_uses_with(env[returned[index]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    for node in module.graph.nodes:
        node.meta.setdefault(ORIGIN, BuildPeriod.name)


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...]) -> fx.Node:
    return call(graph, target, args, origin=BuildPeriod.name)


def _kept(block: Tensor, nodes_BK: Tensor) -> Tensor:
    """The K/V of a path's nodes in a block [layers, B, G, K, D], in path order."""
    shape = (*block.shape[:3], nodes_BK.shape[1], block.shape[4])
    return block.gather(3, nodes_BK[None, :, None, :, None].expand(shape))


def _refreshed(
    given: Mapping[str, Tensor], activity: Tensor, verdict: Verdict
) -> dict[str, Tensor]:
    """The statistic including the accepted tokens, and the neurons, selected again if `refresh`."""
    statistic = given["statistic"] + observed(activity, verdict.nodes, verdict.advance)
    count = given["neurons"].shape[-1]
    (neurons,) = higher_order.cond(
        given["refresh"],
        lambda statistic, neurons: (select_neurons(statistic, count),),
        lambda statistic, neurons: (neurons.clone(),),
        (statistic, given["neurons"]),
    )
    return {"statistic": statistic, "neurons": neurons}


def _fake_inputs(names: Sequence[str], program: Program, period: int) -> dict[str, Tensor]:
    """Fake values of the period's inputs; only rows B and cache slots S are symbolic."""
    state, sparsity = program.state, program.sparsity
    extents: dict[str, Any] = {
        "K": period,
        "layers": state.layers,
        "G": state.kv_heads,
        "D": state.key_dim,
        "Dv": state.value_dim,
        "I": sparsity.neurons,
        "kept": sparsity.kept_neurons,
    }
    extents["B"], extents["S"] = _symbols(3, 1024)
    values = {}
    for name in names:
        spec = INPUTS[name]
        dtype = CAPTURE_DTYPE if spec.dtype == "model" else getattr(torch, spec.dtype)
        values[name] = torch.empty([extents.get(str(e), e) for e in spec.shape], dtype=dtype)
    return values


def _symbols(*hints: int) -> torch.Size:
    """New symbolic sizes in the current fake mode; `hints` are their example values."""
    mode = detect_fake_mode()
    assert mode is not None
    dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(hints))
    with unset_fake_temporarily():
        example = torch.empty(hints, device="meta")
    return mode.from_tensor(example, symbolic_context=dynamic).shape
