"""Runs the sparse path over whole texts, with each token's own selection of neurons and channels.

In a call of many tokens, the sparse operators make one selection for all tokens of a row, as is
right for the beams of a tree. Generation drafts one token a step, but calibration reads thousands
of tokens in a call. So here each token becomes its own row in the operators that select.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sirius_passes.blocks import layer_inputs
from sirius_passes.program import FULL, SPARSE
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.errors import CalibrationError
from sirius_runtime.kernels.arguments import MOST_TOKENS
from sirius_runtime.kernels.linear import nested_product
from sirius_runtime.nested import multiplying
from sirius_runtime.operators import OPERATORS, Operator
from sirius_runtime.policy import select_neurons
from sirius_runtime.spec import JSON, ProgramSpec
from sirius_runtime.tensor_state import TensorState

_SPARSE_LINEAR = OPERATORS["sparse_linear"]

Look = Callable[[int, Tensor], None]
"""Called with the index of a counted site and its scores [R, T, units]."""


class Tokenwise:
    """Runs a program's paths over texts of equal length."""

    def __init__(
        self,
        spec: ProgramSpec,
        documents: Mapping[str, JSON],
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`documents`: the graphs of the entries `prefill`, `sparse` and `full`."""
        self.spec = spec
        self.backend = EagerBackend(spec, documents, weights, dtype=dtype, device=device)
        if device.type == "cpu":
            self._use_our_linears()
        self.graph = self.backend._entries[SPARSE].module.graph
        # In the order of the passes' sites: MLPs, then linears, each in the graph's order.
        rows = {node: row_of(node) for node in self.graph.nodes}
        counted = [node for node, row in rows.items() if row and row.has_threshold]
        self.counted = sorted(counted, key=lambda node: rows[node] is _SPARSE_LINEAR)

    def _use_our_linears(self) -> None:
        """Replaces torch's linears by `sirius::linear`, which takes a fraction of the time for many
        tokens in a 16-bit dtype (`ops.products`).
        """
        for entry in self.backend._entries.values():
            for node in entry.module.graph.find_nodes(
                op="call_function", target=torch.ops.aten.linear.default
            ):
                node.target = torch.ops.sirius.linear.default
            entry.module.recompile()

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @torch.inference_mode()
    def neurons(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """The prompts' neurons [layers, R, K]; None if the method does not select by prompt."""
        statistic = self.statistic(prompts)
        return None if statistic is None else self.select(statistic)

    @torch.inference_mode()
    def statistic(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """The statistic [layers, R, I] by which the prompts' neurons are selected; None if the
        method does not select by prompt.
        """
        if not self.spec.sparsity.method.per_prompt:
            return None
        state = TensorState(self.backend, len(prompts), max(map(len, prompts)))
        state.prefill(prompts)
        return state.statistic

    def select(self, statistic: Tensor) -> Tensor:
        """The neurons [layers, R, K] with the largest statistic [layers, R, I]."""
        return select_neurons(statistic, self.spec.sparsity.kept_neurons)

    def full(self, ids_RT: Tensor) -> Tensor:
        """The full path's logits [R, T, V]."""
        return self.read(ids_RT)[0]

    @torch.inference_mode()
    def read(self, ids_RT: Tensor) -> tuple[Tensor, Caches]:
        """The full path's logits [R, T, V], and its K/V for these tokens."""
        entry = self.backend._entries[FULL]
        inputs = self._inputs(ids_RT, None, None)
        logits = entry.module(*entry.arguments(inputs))[0]
        return logits, Caches(inputs["k_cache"], inputs["v_cache"])

    @torch.inference_mode()
    def sparse(
        self,
        ids_RT: Tensor,
        neurons: Tensor | None,
        look: Look = lambda site, scores: None,
        history: History | None = None,
    ) -> Tensor:
        """The sparse path's logits [R, T, V] for tokens after `history` (by default, none). `look`
        is called with the scores at each counted site.
        """
        return _Walk(self, look).run(*self._arguments(ids_RT, neurons, history))[0]

    @torch.inference_mode()
    def observe(
        self, ids_RT: Tensor, neurons: Tensor | None, look: Look, history: History | None = None
    ) -> None:
        """Like `sparse`, but returns nothing, and stops after the last counted site."""
        _Walk(self, look, ends=True).run(*self._arguments(ids_RT, neurons, history))

    @torch.inference_mode()
    def blocks(
        self,
        ids_RT: Tensor,
        neurons: Tensor | None,
        visit: Callable[[Block], None],
        history: History | None = None,
    ) -> None:
        """Runs the sparse path, and calls `visit` with each layer as soon as it has run."""
        _BlockWalk(self, visit).run(*self._arguments(ids_RT, neurons, history))

    def _arguments(
        self, ids_RT: Tensor, neurons: Tensor | None, history: History | None
    ) -> list[Tensor | None]:
        return self.backend._entries[SPARSE].arguments(self._inputs(ids_RT, neurons, history))

    def _inputs(
        self, ids_RT: Tensor, neurons: Tensor | None, history: History | None = None
    ) -> dict[str, Tensor]:
        device, dtype, state = self.device, self.backend.dtype, self.spec.state
        rows, tokens = ids_RT.shape
        index = torch.arange(tokens, device=device)
        if history is None:
            shape = (state.layers, rows, state.kv_heads, tokens)
            history = History(
                Caches(
                    torch.zeros(*shape, state.key_dim, dtype=dtype, device=device),
                    torch.zeros(*shape, state.value_dim, dtype=dtype, device=device),
                ),
                torch.zeros(rows, dtype=torch.int64, device=device),
            )
        places = history.length[:, None] + index
        inputs = {
            "input_ids": ids_RT.to(device),
            "positions": places.clamp(max=self.spec.model.max_seq_len - 1),
            "slots": places,
            "length": history.length,
            "tree_mask": (index[:, None] - index).clamp(min=-1)[None],
            "k_cache": history.caches.k,
            "v_cache": history.caches.v,
        }
        return inputs if neurons is None else inputs | {"neurons": neurons}


class Caches(NamedTuple):
    """K/V [layers, R, heads, S, dim]."""

    k: Tensor
    v: Tensor

    def rows(self, first: int, end: int) -> Caches:
        """The caches of rows [first, end)."""
        return Caches(self.k[:, first:end], self.v[:, first:end])

    def after(self, rows: Sequence[int], lengths: Sequence[int], room: int) -> History:
        """A copy of rows [N], each committed up to its length in `lengths`, with slots for `room`
        more tokens. K/V after that length is overwritten before it is read.
        """
        slots, index = max(lengths) + room, torch.tensor(rows, device=self.k.device)
        found = []
        for cache in self:
            kept = cache[:, :, :, :slots].index_select(1, index)
            found.append(F.pad(kept, (0, 0, 0, slots - kept.shape[3])))
        return History(Caches(*found), torch.tensor(lengths, device=self.k.device))


class History(NamedTuple):
    """The tokens before a text: their KV caches, and each row's committed length [R]. The text's
    K/V is written to the slots after that length.
    """

    caches: Caches
    length: Tensor


class Block:
    """A layer that has just run, and can be run again with other thresholds.

    A new run computes only the values that depend on the changed threshold.
    """

    def __init__(
        self, layer: int, nodes: Sequence[fx.Node], env: Mapping[fx.Node, Any], path: Tokenwise
    ) -> None:
        self.layer = layer
        self._end = nodes[-1]
        self._env, self._thresholds = dict(env), dict[fx.Node, float]()
        self._runs: dict[tuple[int, float], dict[fx.Node, Any]] = {}  # since the last `set`
        within = set(nodes)
        self.sites = [index for index, node in enumerate(path.counted) if node in within]
        self._after = {index: _after(path.counted[index], nodes) for index in self.sites}

    @property
    def output(self) -> Tensor:
        """The layer's output [R, T, C], with the thresholds that were set."""
        return self._env[self._end]

    def run(self, site: int, threshold: float) -> Tensor:
        """The layer's output [R, T, C] with this threshold at the site. Changes nothing."""
        return self._run(site, threshold)[self._end]

    def set(self, site: int, threshold: float) -> None:
        """Sets the site's threshold."""
        self._env |= self._run(site, threshold)
        self._runs.clear()
        self._thresholds[self._after[site][0]] = threshold

    def _run(self, site: int, threshold: float) -> dict[fx.Node, Any]:
        """The values of the site and of all nodes after it, with this threshold."""
        if (site, threshold) not in self._runs:
            self._runs[site, threshold] = self._compute(site, threshold)
        return self._runs[site, threshold]

    def _compute(self, site: int, threshold: float) -> dict[fx.Node, Any]:
        changed = self._after[site]
        thresholds = self._thresholds | {changed[0]: threshold}
        new: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            return new[node] if node in new else self._env[node]

        for node in changed:
            assert callable(node.target)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            if node in thresholds:
                args = (*args[:-1], thresholds[node])
            new[node] = run_node(node, args, kwargs)
        return new


def _after(node: fx.Node, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """`node` and the nodes that depend on it, in the order of `nodes`."""
    found = {node: None}
    for other in nodes:
        if any(source in found for source in other.all_input_nodes):
            found.setdefault(other)
    return list(found)


def tokenwise(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Runs a sparse operator with each token as a row. Returns y [R, T, O], and the counts [R, T]
    if the operator counts.
    """
    rows, tokens = args[0].shape[:2]
    schema = target._schema.arguments
    layer = next((v for a, v in zip(schema, args, strict=False) if a.name == "layer"), 0)
    parts = []
    for argument, value in zip(schema, args, strict=False):
        if argument.name == "neurons":
            # Only this layer's neurons are read; repeating those of all layers would need much
            # memory.
            repeated = value[layer][None].repeat_interleave(tokens, 1)
            value = repeated.expand(value.shape[0], -1, -1)
        elif isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (rows, tokens):
            value = value.reshape(rows * tokens, 1, -1)
        parts.append(value)
    if rows * tokens > MOST_TOKENS:
        # The kernels are made for the few rows of a decoding step. With many rows, the reference is
        # faster, as it multiplies masked dense matrices.
        with multiplying(nested_product):
            result = OPERATORS[target._opname].reference(*parts, **kwargs)
    else:
        result = target(*parts, **kwargs)
    if isinstance(result, Tensor):
        return result.reshape(rows, tokens, -1)
    y, count = result
    return y.reshape(rows, tokens, -1), count.reshape(rows, tokens)


def row_of(node: fx.Node) -> Operator | None:
    """The row of a node's operator in the table of operators; None for torch's operators.

    Raises CalibrationError for a sirius operator without a row: whether its tokens share a
    selection is unknown, and a wrong guess would silently give wrong thresholds.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "sirius":
        return None
    if target._opname not in OPERATORS:
        raise CalibrationError(
            f"calibration does not know sirius.{target._opname}, which {node.name} calls, because "
            "the table of operators has no row for it. Add one to sirius_runtime.operators"
        )
    return OPERATORS[target._opname]


def run_node(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A call's results, computed token by token if the operator's tokens share a selection."""
    assert callable(node.target)
    row = row_of(node)
    if row is not None and row.shares_choice:
        return tokenwise(node.target, args, kwargs)
    return node.target(*args, **kwargs)


class _Walk(fx.Interpreter):
    def __init__(self, path: Tokenwise, look: Look, *, ends: bool = False) -> None:
        """`ends`: computes nothing after the last counted site."""
        super().__init__(path.backend._entries[SPARSE].module)
        self._look = look
        self._site_of = {node: index for index, node in enumerate(path.counted)}
        self._left = len(path.counted) if ends else -1

    def run_node(self, n: fx.Node) -> Any:
        if self._left == 0:
            return None
        row = row_of(n)
        if row is None or not row.shares_choice:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n in self._site_of:
            assert row.scores is not None
            self._look(self._site_of[n], row.scores(*args))
            self._left -= 1
            if self._left == 0:
                return None
        return tokenwise(n.target, args, kwargs)


class _BlockWalk(_Walk):
    """Keeps the values of a layer's nodes until the layer has been visited."""

    def __init__(self, path: Tokenwise, visit: Callable[[Block], None]) -> None:
        super().__init__(path, lambda site, scores: None)
        self.garbage_collect_values = False
        self._path, self._visit = path, visit
        graph = path.graph
        self._nodes = list(graph.nodes)
        self._order = {node: index for index, node in enumerate(self._nodes)}
        self._bounds = layer_inputs(graph)
        self._last_use = {
            node: max((self._order[user] for user in node.users), default=-1)
            for node in graph.nodes
        }

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._bounds[1:]:
            layer = self._bounds.index(n) - 1
            first, last = self._order[self._bounds[layer]] + 1, self._order[n]
            env = self.env | {n: value}
            self._visit(Block(layer, self._nodes[first : last + 1], env, self._path))
            for node in [node for node in self.env if self._last_use[node] < last]:
                del self.env[node]
        return value
