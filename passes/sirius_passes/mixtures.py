"""Mixtures of experts in a program: a node's sizes, and the methods that apply to it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx

from sirius_passes.program import Program, calls
from sirius_passes.recognise_mlps import DENSE_MOE
from sirius_passes.weight_views import weight_name
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.safetensors_file import size_of
from sirius_runtime.spec import Method, WeightSpec


@dataclass(frozen=True)
class Mixture:
    """A node of `sirius::dense_moe`."""

    node: fx.Node

    @property
    def layer(self) -> int:
        return self._argument(10)

    @property
    def experts(self) -> int:
        """E."""
        return int(self._argument(3).meta["val"].shape[0])

    @property
    def per_token(self) -> int:
        """k."""
        return int(self._argument(1).meta["val"].shape[-1])

    @property
    def neurons(self) -> int:
        """I, of one expert."""
        return int(self._argument(3).meta["val"].shape[1])

    @property
    def neuron_parameters(self) -> int:
        """Parameters of a neuron's rows of up (if there is one) and down, without the gate's."""
        width = int(self._argument(3).meta["val"].shape[2])
        return width * (1 if self._argument(4) is None else 2)

    @property
    def weight(self) -> str:
        """The name of the gates' weight."""
        return weight_name(self._argument(3))

    def expert_parameters(self, program: Program) -> int:
        """Parameters of one expert."""
        return sum(spec.numbers for spec in self._weights(program)) // self.experts

    def expert_bytes(self, program: Program) -> int:
        """Stored bytes of one expert."""
        return sum(size_of(spec) for spec in self._weights(program)) // self.experts

    def _weights(self, program: Program) -> list[WeightSpec]:
        tensors = [self._argument(i) for i in range(3, 9)]
        names = {weight_name(node) for node in tensors if node is not None}
        return [program.weights[name] for name in names]

    def _argument(self, index: int) -> Any:
        return self.node.args[index]


def mixtures(graph: fx.Graph, dense_layers: Collection[int] = ()) -> list[Mixture]:
    """The dense mixtures of experts of a graph, without those of `dense_layers`."""
    found = map(Mixture, calls(graph, DENSE_MOE))
    return [mixture for mixture in found if mixture.layer not in dense_layers]


def check_method(program: Program, method: Method) -> None:
    """Raises UnsupportedModelError if a method can't handle the program's mixtures of experts, or
    needs mixtures where there are none.
    """
    found = [m for module in program.graphs.values() for m in mixtures(module.graph)]
    if found and method not in (Method.NONE, Method.TOPK, Method.EXPERTS):
        layers = ", ".join(str(mixture.layer) for mixture in found)
        raise UnsupportedModelError(
            f"--sparsity {method} does not support mixtures of experts, and layers {layers} are "
            "mixtures. Use --sparsity topk or experts"
        )
    if method is Method.EXPERTS and not found:
        raise UnsupportedModelError(
            "--sparsity experts skips experts, and this model has none. Use --sparsity topk, cats "
            "or griffin"
        )
