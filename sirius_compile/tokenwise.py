"""The sparse path over whole texts at once, every token choosing its own neurons and channels.

Generation runs one token a step; a call of many tokens would have them share one choice, as the
beams of a tree do. Calibration reads thousands of tokens, so here each of them is made a row of its
own where the sparse operators choose, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sirius_passes.blocks import layer_inputs
from sirius_passes.program import FULL, SPARSE
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.errors import CalibrationError
from sirius_runtime.operators import OPERATORS, Operator
from sirius_runtime.spec import JSON, ProgramSpec
from sirius_runtime.tensor_state import TensorState

_SPARSE_LINEAR = OPERATORS["sparse_linear"]

Look = Callable[[int, Tensor], None]
"""Is shown the scores [R, T, units] of a counted site, by its index."""


class Tokenwise:
    """A program's sparse path over texts of equal lengths, after no history."""

    def __init__(
        self,
        spec: ProgramSpec,
        documents: Mapping[str, JSON],
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`documents`: of the entries `prefill`, `sparse` and `full`."""
        self.spec = spec
        self._backend = EagerBackend(spec, documents, weights, dtype=dtype, device=device)
        self.graph = self._backend._entries[SPARSE].module.graph
        # As the passes list their sites: MLPs, then linears, each in the graph's order.
        rows = {node: row_of(node) for node in self.graph.nodes}
        counted = [node for node, row in rows.items() if row and row.has_threshold]
        self.counted = sorted(counted, key=lambda node: rows[node] is _SPARSE_LINEAR)

    @torch.inference_mode()
    def neurons(self, prompts_RT: Tensor) -> Tensor | None:
        """What the method keeps for these prompts [layers, R, K]; None where it does not ask."""
        if not self.spec.sparsity.method.per_prompt:
            return None
        rows, tokens = prompts_RT.shape
        state = TensorState(self._backend, rows, tokens)
        state.prefill(prompts_RT.tolist())
        state.choose_neurons()
        assert state.neurons is not None
        return state.neurons

    @torch.inference_mode()
    def full(self, ids_RT: Tensor) -> Tensor:
        """The full path's logits [R, T, V]."""
        entry = self._backend._entries[FULL]
        return entry.module(*entry.arguments(self._inputs(ids_RT, None)))[0]

    @torch.inference_mode()
    def sparse(
        self, ids_RT: Tensor, neurons: Tensor | None, look: Look = lambda site, scores: None
    ) -> Tensor:
        """The sparse path's logits [R, T, V]; `look` is shown the scores on the way."""
        walk = _Walk(self, look)
        entry = self._backend._entries[SPARSE]
        return walk.run(*entry.arguments(self._inputs(ids_RT, neurons)))[0]

    @torch.inference_mode()
    def blocks(
        self, ids_RT: Tensor, neurons: Tensor | None, visit: Callable[[Block], None]
    ) -> None:
        """Runs the sparse path, and shows each layer to `visit` as soon as it has run."""
        walk = _BlockWalk(self, visit)
        entry = self._backend._entries[SPARSE]
        walk.run(*entry.arguments(self._inputs(ids_RT, neurons)))

    def _inputs(self, ids_RT: Tensor, neurons: Tensor | None) -> dict[str, Tensor]:
        device, state = self._backend.device, self.spec.state
        rows, tokens = ids_RT.shape
        index = torch.arange(tokens, device=device)
        shape = (state.layers, rows, state.kv_heads, tokens)
        inputs = {
            "input_ids": ids_RT.to(device),
            "positions": index.expand(rows, tokens),
            "slots": index.expand(rows, tokens),
            "length": torch.zeros(rows, dtype=torch.int64, device=device),
            "tree_mask": (index[:, None] - index).clamp(min=-1)[None],
            "k_cache": torch.zeros(*shape, state.key_dim, dtype=self._backend.dtype, device=device),
            "v_cache": torch.zeros(
                *shape, state.value_dim, dtype=self._backend.dtype, device=device
            ),
        }
        return inputs if neurons is None else inputs | {"neurons": neurons}


class Block:
    """A layer that has just run, to be run again with other thresholds."""

    def __init__(
        self, layer: int, nodes: Sequence[fx.Node], env: Mapping[fx.Node, Any], path: Tokenwise
    ) -> None:
        self.layer = layer
        self._nodes, self._env = nodes, env
        within = set(nodes)
        self.sites = [index for index, node in enumerate(path.counted) if node in within]
        self._site_of = {path.counted[index]: index for index in self.sites}

    @property
    def output(self) -> Tensor:
        """The stream after the layer [R, T, C]."""
        return self._env[self._nodes[-1]]

    def run(self, thresholds: Mapping[int, float]) -> Tensor:
        """The stream after the layer, with these thresholds by site."""
        new: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            return new[node] if node in new else self._env[node]

        for node in self._nodes:
            if node.op != "call_function":
                continue
            assert callable(node.target)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            if node in self._site_of:
                args = (*args[:-1], thresholds[self._site_of[node]])
            new[node] = run_node(node, args, kwargs)
        return new[self._nodes[-1]]


def tokenwise(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A sparse operator's results, every token a row: y [R, T, O], and a count [R, T] if any."""
    rows, tokens = args[0].shape[:2]
    parts = []
    for argument, value in zip(target._schema.arguments, args, strict=False):
        if argument.name == "neurons":
            value = value.repeat_interleave(tokens, 1)
        elif isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (rows, tokens):
            value = value.reshape(rows * tokens, 1, -1)
        parts.append(value)
    result = target(*parts, **kwargs)
    if isinstance(result, Tensor):
        return result.reshape(rows, tokens, -1)
    y, count = result
    return y.reshape(rows, tokens, -1), count.reshape(rows, tokens)


def row_of(node: fx.Node) -> Operator | None:
    """The row of a node's operator; None of those that are torch's own.

    Raises CalibrationError for an operator of ours without one: whether its tokens share a choice
    is not known, and the wrong way gives wrong thresholds without a word.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "sirius":
        return None
    if target._opname not in OPERATORS:
        raise CalibrationError(
            f"calibration does not know sirius.{target._opname}, which {node.name} calls: it has "
            "no row in the table of operators. Add it to sirius_runtime.operators"
        )
    return OPERATORS[target._opname]


def run_node(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A call's results, token by token where tokens share a choice."""
    assert callable(node.target)
    row = row_of(node)
    if row is not None and row.shares_choice:
        return tokenwise(node.target, args, kwargs)
    return node.target(*args, **kwargs)


class _Walk(fx.Interpreter):
    def __init__(self, path: Tokenwise, look: Look) -> None:
        super().__init__(path._backend._entries[SPARSE].module)
        self._look = look
        self._site_of = {node: index for index, node in enumerate(path.counted)}

    def run_node(self, n: fx.Node) -> Any:
        row = row_of(n)
        if row is None or not row.shares_choice:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n in self._site_of:
            assert row.scores is not None
            self._look(self._site_of[n], row.scores(*args))
        return tokenwise(n.target, args, kwargs)


class _BlockWalk(_Walk):
    """Keeps a layer's values until it has been visited."""

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
