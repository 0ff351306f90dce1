"""Captures mixtures of experts: one `sirius::dense_moe` a layer.

transformers lets a function replace the loop over experts, as it does for attention. Ours emits the
operator over views of the module's weights, in the operator's layout: gate, up and down [E, I, C].
A module's gating (how it combines gate and up) is found by running it on a grid of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.ops.moe import EXPERT_ACTIVATIONS, gated

_GRID = torch.linspace(-9, 9, 73, dtype=torch.float64)
_NEAR = 1e-6


class Experts:
    """transformers' experts function. `layer`: the layer of the last attention traced."""

    def __init__(self) -> None:
        self.layer = 0
        self._gatings: dict[int, tuple[str, int]] = {}

    def look_at(self, model: nn.Module) -> None:
        """Finds each experts module's gating. Call it before tracing.

        Raises UnsupportedModelError, naming the class, for a module that can't be expressed.
        """
        for module in model.modules():
            if hasattr(module, "is_transposed") and hasattr(module, "_apply_gate"):
                self._gatings[id(module)] = _gating(module)

    def __call__(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Emits the operator; hidden_states [N, C], top_k_index and top_k_weights [N, k]."""
        act, stride = self._gatings[id(module)]
        rows = list(_rows(module, stride))
        down: Any = module.down_proj
        return torch.ops.sirius.dense_moe(
            hidden_states,
            top_k_index,
            top_k_weights,
            rows[0][0],
            rows[1][0] if len(rows) > 1 else None,
            down if module.is_transposed else down.transpose(1, 2),
            rows[0][1],
            rows[1][1] if len(rows) > 1 else None,
            getattr(module, "down_proj_bias", None),
            act,
            self.layer,
        )


def _rows(module: Any, stride: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The weight [E, I, C] and bias [E, I] of gate, and of up if there is one.

    `stride`: 1 if gate's rows come before up's, 2 if they alternate.
    """
    name = "gate_up_proj" if module.has_gate else "up_proj"
    weight, bias = getattr(module, name), getattr(module, f"{name}_bias", None)
    weight = weight.transpose(1, 2) if module.is_transposed else weight
    if not module.has_gate:
        yield weight, bias
        return
    half = weight.shape[1] // 2
    for part in range(2):
        rows = slice(part, None, 2) if stride == 2 else slice(part * half, (part + 1) * half)
        yield weight[:, rows], None if bias is None else bias[:, rows]


def _gating(module: Any) -> tuple[str, int]:
    """A module's function of gate and up (a name in EXPERT_ACTIVATIONS), and `_rows`' stride.

    Raises UnsupportedModelError if no known function and stride match.
    """
    where = type(module).__name__
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    if missing := [name for name in names if not isinstance(getattr(module, name, None), Tensor)]:
        raise UnsupportedModelError(f"{where}: experts without a {missing[0]} are not supported")
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedModelError(f"{where}: experts that contain a norm are not supported")
    gate, up = torch.meshgrid(_GRID, _GRID, indexing="ij")
    for stride in (1, 2) if module.has_gate else (1,):
        if module.has_gate:
            dim = -1 if stride == 2 else 0
            both = torch.stack([gate.flatten(), up.flatten()], dim).flatten()
            computed = module._apply_gate(both[None])[0]
        else:
            computed = module.act_fn(gate.flatten())
        for name, function in EXPERT_ACTIVATIONS.items():
            wanted = gated(function(gate), up if module.has_gate else None, name).flatten()
            if torch.allclose(computed.double(), wanted, rtol=_NEAR, atol=_NEAR):
                return name, stride
    known = ", ".join(EXPERT_ACTIVATIONS)
    raise UnsupportedModelError(f"{where}: its experts' activation is not a known one ({known})")
