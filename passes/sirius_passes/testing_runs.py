"""Runs the graphs of a program on random weights and on calls as the runtime makes them.

A graph with a KV cache is called three times, and each row has its own length: prompts of different
lengths, then a chain of tokens, then a tree. A graph without a cache computes the logits of the
same tokens by running the path to each token separately. Shape letters are those of
`sirius_runtime.ops`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from sirius_passes.program import OUTPUTS, Program, Stage, calls
from sirius_passes.stored_form import checkpoint_shape, stored_form
from sirius_runtime.dtypes import dtype_name, dtype_of
from sirius_runtime.graph import CAPTURE_DTYPE, INPUT, WEIGHT, placeholders, subgraph

Tensors = Mapping[str, Tensor]

Run = Callable[[Tensors, Tensors], Tensors]
"""From a graph's inputs and weights, both by name, to its outputs by name."""

Reference = Callable[[str, fx.GraphModule, Tensors, Tensors], Tensors]
"""Computes the expected outputs of a graph, from its name, the graph before the pass, its inputs
(of `program.INPUTS`) and its weights, both by name. Like the graph, it writes the caches in place.
Before stage CACHED it is called for the logits [1, T, V] of one path of tokens at a time.
"""

_LENGTHS = (4, 2)  # tokens of the prompts
_CHAIN = 3  # tokens
_TREE = ((0, -1, -1, -1), (1, 0, -1, -1), (1, -1, 0, -1), (2, -1, 1, 0))  # 0 ── 1, 0 ── 2 ── 3
_CACHE_SLOTS = 16


def run_graph(
    module: fx.GraphModule,
    inputs: Tensors,
    weights: Tensors,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Runs one graph of a program on the CPU, computing in `dtype`; returns its outputs by name.

    `inputs` and `weights` hold at least the tensors that the graph reads. Tensors of the program's
    dtype are given in `dtype`. The graph writes the caches in place.
    """
    return runnable(module, dtype)(inputs, weights)


def runnable(
    module: fx.GraphModule, dtype: torch.dtype
) -> Callable[[Tensors, Tensors], dict[str, Tensor]]:
    """A function that does `run_graph` on `module`; prepared once, for many calls."""
    graph = _in_dtype(module, dtype)
    bound = [node.meta for node in graph.graph.nodes if node.op == "placeholder"]
    names = module.graph.output_node().meta[OUTPUTS]

    def run(inputs: Tensors, weights: Tensors) -> dict[str, Tensor]:
        arguments = [weights[m[WEIGHT]] if WEIGHT in m else inputs[m[INPUT]] for m in bound]
        with torch.no_grad():
            return dict(zip(names, graph(*arguments), strict=True))

    return run


def _in_dtype(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A copy that computes in `dtype`.

    Reading the graph back from its document would also set the dtype, but a captured graph calls
    operators that documents may not contain.
    """
    root, graph = torch.nn.Module(), fx.Graph()
    env: dict[fx.Node, fx.Node] = {}

    def constant(value: Any) -> Any:
        return dtype if value is CAPTURE_DTYPE else value

    for node in module.graph.nodes:
        if node.op == "get_attr":
            root.add_module(str(node.target), _in_dtype(subgraph(node), dtype))
        copy = env[node] = graph.node_copy(node, env.__getitem__)
        copy.args = fx.node.map_aggregate(copy.args, constant)
        copy.kwargs = fx.node.map_aggregate(copy.kwargs, constant)
    return fx.GraphModule(root, graph)


def random_weights(
    program: Program, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random values for the weight table; weights of the program's dtype are in `dtype`.

    They depend only on the weight's name, its shape in the checkpoint and the seed, so a change of
    layout does not change the values. Matrices are scaled to preserve the variance of their input,
    vectors are in [0.5, 1.5), integers are 0.
    """
    weights = {}
    for name, spec in program.weights.items():
        shape = checkpoint_shape(spec)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        uniform = torch.rand(shape, generator=generator)
        value = (uniform - 0.5) * math.sqrt(12 / shape[-1]) if len(shape) > 1 else uniform + 0.5
        if spec.nested is None and not dtype_of(spec.dtype).is_floating_point:
            value = torch.zeros(shape)
        own = replace(spec, dtype=dtype_name(dtype)) if spec.retype else spec
        weights[name] = stored_form(own, value)
    return weights


@dataclass(frozen=True)
class Call:
    """A block of tokens [B, T] after the committed `history` of each row.

    `what`: the call's name in messages. `distance` [T, T]: a token's depth minus the depth of each
    token that it attends to; -1 for the other tokens. `valid` [B, T]: False for padding.
    """

    what: str
    history: tuple[Tensor, ...]
    tokens: Tensor
    distance: Tensor
    valid: Tensor

    @property
    def rows(self) -> int:
        """B, the number of rows."""
        return self.tokens.shape[0]

    @property
    def last(self) -> Tensor:
        """The index [B] of each row's last valid token."""
        return self.valid.sum(1) - 1

    def inputs(self) -> dict[str, Tensor]:
        """Every input that a cached graph may read, except the state."""
        length = torch.tensor([len(tokens) for tokens in self.history])
        return {
            "input_ids": self.tokens,
            "positions": length[:, None] + self.distance[:, 0],
            "slots": length[:, None] + torch.arange(self.tokens.shape[1]),
            "length": length,
            "tree_mask": self.distance[None],
            "last": self.last,
            "valid": self.valid,
        }

    def path(self, row: int, token: int) -> Tensor:
        """The tokens that one token of the block attends to, from the row's first to itself."""
        seen = [i for i, distance in enumerate(self.distance[token].tolist()) if distance >= 0]
        seen.sort(key=lambda i: -int(self.distance[token, i]))
        return torch.cat([self.history[row], self.tokens[row, seen]])


def make_calls(module: fx.GraphModule, seed: int) -> list[Call]:
    """Prompts, a chain and a tree of random tokens that `module` can embed."""
    vocabulary = _vocabulary(module)
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> Tensor:
        return torch.randint(vocabulary, (len(_LENGTHS), count), generator=generator)

    def chain(count: int) -> Tensor:
        index = torch.arange(count)
        return (index[:, None] - index).clamp(min=-1)

    prompt, draft, tree = tokens(max(_LENGTHS)), tokens(_CHAIN), tokens(len(_TREE))
    no_padding = torch.tensor(True)
    empty = tuple(prompt[:, :0])
    prompted = tuple(row[:length] for row, length in zip(prompt, _LENGTHS, strict=True))
    drafted = tuple(map(torch.cat, zip(prompted, draft, strict=True)))
    in_prompt = torch.arange(max(_LENGTHS)) < torch.tensor(_LENGTHS)[:, None]
    return [
        Call("the prompts", empty, prompt, chain(max(_LENGTHS)), in_prompt),
        Call("a chain", prompted, draft, chain(_CHAIN), no_padding.expand_as(draft)),
        Call("a tree", drafted, tree, torch.tensor(_TREE), no_padding.expand_as(tree)),
    ]


def _vocabulary(module: fx.GraphModule) -> int:
    """The rows of the graph's token embedding; 8 if it has no embedding table."""
    tokens = placeholders(module.graph, INPUT).get("input_ids")
    embeddings = calls(module.graph, torch.ops.aten.embedding.default)
    tables = [n.args[0].meta["val"] for n in embeddings if n.args[1] is tokens]  # type: ignore[union-attr]
    return min((int(table.shape[0]) for table in tables), default=8)


class Subject:
    """A graph with random weights and its own state. `run` computes each call."""

    def __init__(self, program: Program, module: fx.GraphModule, run: Run, seed: int) -> None:
        self._run = run
        self._inputs = set(placeholders(module.graph, INPUT))
        self._cached = program.stage >= Stage.CACHED
        self._weights = random_weights(program, seed)
        self._state = _state(program, torch.Generator().manual_seed(seed))

    def __call__(self, call: Call) -> Tensors:
        if not self._cached:
            return self._by_paths(call)
        known = call.inputs() | self._state
        unknown = self._inputs - known.keys()
        assert not unknown, f"no values are known for the inputs {sorted(unknown)}"
        return self._run(known, self._weights)

    def _by_paths(self, call: Call) -> Tensors:
        rows, tokens = call.tokens.shape
        logits = []
        for row in range(rows):
            for token in range(tokens):
                path = call.path(row, token)[None]
                inputs = {"input_ids": path, "positions": torch.arange(path.shape[1])[None]}
                logits.append(self._run(inputs, self._weights)["logits"][0, -1])
        return {"logits": torch.stack(logits).unflatten(0, (rows, tokens))}


def _state(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    """Caches filled with large noise, so that a read of an unwritten slot shows, and random neurons
    for griffin.
    """
    state, rows = program.state, len(_LENGTHS)
    cache = (state.layers, rows, state.kv_heads, _CACHE_SLOTS)
    values = {
        "k_cache": 9 * torch.randn(*cache, state.key_dim, generator=generator),
        "v_cache": 9 * torch.randn(*cache, state.value_dim, generator=generator),
    }
    if program.sparsity.neurons:
        layers = max(program.state.layers, len(program.sparsity.sites))
        shape = (layers, rows, program.sparsity.neurons)
        scores = torch.rand(*shape, generator=generator)
        values["neurons"] = scores.topk(program.sparsity.kept_neurons).indices
    return values
