"""Mixtures of experts (MoE) in a program: their sizes, and the sparsity methods that apply."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from sirius_passes.program import Program, calls
from sirius_passes.recognise_mlps import DENSE_MOE
from sirius_passes.weight_views import weight_name
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.spec import Method


@dataclass(frozen=True)
class Mixture:
    """A node of `sirius::dense_moe`."""

    node: fx.Node

    @property
    def layer(self) -> int:
        return self._argument(10)

    @property
    def experts(self) -> int:
        """E, the number of experts."""
        return int(self._gate[-3])

    @property
    def per_token(self) -> int:
        """k, the number of experts that the router chooses for a token."""
        return int(self._argument(1).meta["val"].shape[-1])

    @property
    def neurons(self) -> int:
        """I, the number of neurons of one expert."""
        return int(self._gate[-2])

    @property
    def neuron_parameters(self) -> int:
        """Parameters that a skipped neuron saves: its rows of up (if there is one) and of down."""
        width = int(self._argument(0).meta["val"].shape[-1])
        return width * (1 if self._argument(4) is None else 2)

    @property
    def weight(self) -> str:
        """The name of the weight that holds the experts' gates."""
        return weight_name(self._argument(3))

    def expert_parameters(self, program: Program) -> int:
        """Parameters of one expert."""
        return sum(program.weights[name].numbers for name in self.weights()) // self.experts

    def weights(self) -> set[str]:
        """The names of the weights and biases of all experts."""
        tensors = [self._argument(i) for i in range(3, 9)]
        return {weight_name(node) for node in tensors if node is not None}

    @property
    def _gate(self) -> Sequence[int]:
        """The gates' shape, which ends with E, I and the size of a row."""
        shape: Sequence[int] = self._argument(3).meta["val"].shape
        return shape

    def _argument(self, index: int) -> Any:
        return self.node.args[index]


def mixtures(graph: fx.Graph, dense_layers: Collection[int] = ()) -> list[Mixture]:
    """The dense mixtures of experts of a graph, except those in `dense_layers`."""
    found = map(Mixture, calls(graph, DENSE_MOE))
    return [mixture for mixture in found if mixture.layer not in dense_layers]


def check_method(program: Program, method: Method) -> None:
    """Raises UnsupportedModelError if a method can't handle the program's mixtures of experts, or
    needs mixtures where there are none.
    """
    found = [m for module in program.graphs.values() for m in mixtures(module.graph)]
    if method is Method.NONE:
        return
    if found and not method.for_mixtures:
        layers = ", ".join(str(mixture.layer) for mixture in found)
        others = " or ".join(other for other in Method if other.for_mixtures)
        raise UnsupportedModelError(
            f"--sparsity {method} does not support mixtures of experts, and layers {layers} are "
            f"mixtures. Use --sparsity {others}"
        )
    if not found and not method.for_dense_models:
        raise UnsupportedModelError(
            "--sparsity experts skips experts, and this model has none. Use --sparsity topk, cats "
            "or griffin"
        )
