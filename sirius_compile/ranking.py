"""Ranks layers by the agreement with the full path that their sparsity costs.

Each layer is tried as the only sparse one. All trials use the graph of the sparse path and run the
operators of other layers as their dense counterparts. A text first runs through the graph with all
layers dense. Each trial then starts at its layer, because the values before that layer are the
same. A trial costs half a run of the model on average, so deep models are ranked on fewer texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sirius_compile.texts import Sample
from sirius_compile.tokenwise import Tokenwise, row_of, run_node
from sirius_passes.program import SPARSE

MOST_TEXTS, LEAST_TEXTS = 8, 2  # bounds of the number of texts
TEXTS_BY_LAYERS = 256  # largest product of the numbers of texts and layers


@dataclass(frozen=True)
class LayerAgreement:
    """Agreement with the full path if only this layer is sparse, in [0, 1]; 1 is full agreement.

    The agreement is the overlap of the two paths' next-token distributions, averaged over tokens.
    It is the probability that lossless sampling accepts a drafted token (arXiv 2211.17192, theorem
    3.5).
    """

    layer: int
    agreement: float


def rank_layers(path: Tokenwise, samples: Sequence[Sample]) -> tuple[LayerAgreement, ...]:
    """Ranks all layers, the costliest first. `path` must be sparse in all layers."""
    walk = _LayerByLayer(path)
    layers = path.spec.state.layers
    found: list[list[Tensor]] = [[] for _ in range(layers)]
    for sample in samples[: texts_of(layers)]:
        first = min(sample.prompt, len(sample) - 1)  # only tokens after the prompt are compared
        full, *alone = (_distribution(logits, first) for logits in walk.run(sample))
        for values, sparse in zip(found, alone, strict=True):
            values.append(torch.minimum(full, sparse).sum(-1))
    ranking = [
        LayerAgreement(layer, float(torch.cat(values).mean())) for layer, values in enumerate(found)
    ]
    return tuple(sorted(ranking, key=lambda one: (one.agreement, one.layer)))


def texts_of(layers: int) -> int:
    """The number of texts that a model of `layers` layers is ranked on."""
    return max(LEAST_TEXTS, min(MOST_TEXTS, TEXTS_BY_LAYERS // layers))


def _distribution(logits: Tensor, first: int) -> Tensor:
    return logits[0, first:].float().softmax(-1)


class _LayerByLayer:
    """Runs the sparse path's graph with all layers dense, then with each layer alone sparse."""

    def __init__(self, path: Tokenwise) -> None:
        self._path = path
        self._entry = path.backend._entries[SPARSE]
        graph = path.graph
        self._logits: fx.Node = graph.output_node().args[0][0]  # type: ignore[index,assignment]
        self._nodes = _leading_to(graph, self._logits)
        self._last = {
            source: index
            for index, node in enumerate(self._nodes)
            for source in node.all_input_nodes
        }
        counted = dict(zip(path.counted, path.spec.sparsity.counted, strict=True))
        self._layer_of = {
            node: counted[node].layer if node in counted else _layer_argument(node)
            for node in self._nodes
            if (row := row_of(node)) and row.dense
        }
        self._starts: dict[int, int] = {}
        for index, node in enumerate(self._nodes):
            if node in self._layer_of:
                self._starts.setdefault(self._layer_of[node], index)

    @torch.inference_mode()
    def run(self, sample: Sample) -> Iterator[Tensor]:
        """Logits [1, T, V] with all layers dense, then with only layer 0 sparse, layer 1, …"""
        ids = torch.tensor([sample.tokens])
        neurons = self._path.neurons([sample.tokens[: sample.prompt]])
        arguments = self._entry.arguments(self._path._inputs(ids, neurons))
        given = dict(zip(self._path.graph.find_nodes(op="placeholder"), arguments, strict=True))
        before: dict[int, dict[fx.Node, Any]] = {}
        env: dict[fx.Node, Any] = {}
        position = 0
        for layer, start in sorted(self._starts.items(), key=lambda pair: pair[1]):
            self._run(position, start, given, env)
            before[layer], position = dict(env), start
        yield self._run(position, len(self._nodes), given, env)
        for layer in range(self._path.spec.state.layers):
            if layer not in before:  # nothing in this layer is sparse
                yield env[self._logits]
            else:
                values = before.pop(layer)
                yield self._run(self._starts[layer], len(self._nodes), given, values, layer)

    def _run(
        self,
        start: int,
        end: int,
        given: Mapping[fx.Node, Any],
        env: dict[fx.Node, Any],
        sparse: int | None = None,
    ) -> Any:
        """Runs nodes [start, end), with only layer `sparse` sparse. `env` keeps the values that
        later nodes read. Returns the logits, or None if their node was not reached.
        """
        for index in range(start, end):
            node = self._nodes[index]
            assert callable(node.target)
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda n: given[n] if n in given else env[n]
            )
            if node not in self._layer_of:
                env[node] = node.target(*args, **kwargs)
            elif self._layer_of[node] == sparse:
                env[node] = run_node(node, args, kwargs)
            else:
                env[node] = _densely(node, args)
            for source in node.all_input_nodes:
                if self._last[source] == index:
                    env.pop(source, None)
        return env.get(self._logits)


def _densely(node: fx.Node, args: Sequence[Any]) -> Any:
    """The result of a sparse operator's dense counterpart on the same operands."""
    row = row_of(node)
    assert row is not None
    assert row.dense is not None
    y = row.dense(*args)
    return (y, None) if len(row.overload._schema.returns) > 1 else y


def _names(target: Any) -> list[str]:
    return [argument.name for argument in target._schema.arguments]


def _layer_argument(node: fx.Node) -> int:
    layer = node.args[_names(node.target).index("layer")]
    assert isinstance(layer, int)
    return layer


def _leading_to(graph: fx.Graph, value: fx.Node) -> list[fx.Node]:
    """The calls that compute `value`, in order; calls that only compute counts are left out."""
    leads = {value}
    for node in reversed(graph.nodes):
        if node in leads:
            leads.update(node.all_input_nodes)
    return [node for node in graph.nodes if node.op == "call_function" and node in leads]
