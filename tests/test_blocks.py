"""Layers found from the residual stream alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from sirius_compile.capture import capture
from sirius_compile.pipeline import front
from sirius_passes.blocks import cuts, layer_inputs, layers_of
from sirius_passes.manager import run_passes
from sirius_passes.program import SPARSE, calls
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.graph import WEIGHT
from sirius_runtime.spec import Method
from tests.support.fast import slow_but
from tests.support.graphs import Attention, Decoder, Mlp, paired, plainly_paired

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "model_type",
    slow_but(("llama", "gemma2", "olmo2", "phi", "cohere", "opt"), (), {"gemma2", "phi"}),
)
def test_every_linear_is_of_the_layer_that_its_name_says(model_type: str) -> None:
    """Pre-norm, post-norm, both, and attention beside the MLP; names are what is checked against,
    and are not read.
    """
    program = capture(AutoConfig.for_model(model_type, **SMALL)).program
    run_passes(program, front(Method.TEAL))
    graph = program.graphs[SPARSE].graph
    linears = calls(graph, torch.ops.aten.linear.default)
    found = layers_of(graph, linears)
    named = {}
    for linear in linears:
        weight = linear.args[1]
        while WEIGHT not in weight.meta:
            weight = weight.args[0]
        name = weight.meta[WEIGHT]
        if ".layers." in name:
            named[linear] = int(name.split(".layers.")[1].split(".")[0])
    assert found == named
    assert len(set(found.values())) == 3


def test_a_layer_begins_at_the_residual_sum_before_its_attention() -> None:
    graph = paired(lambda: Decoder(Attention(0), Mlp(), Attention(1), Mlp())).graphs[SPARSE].graph
    starts = layer_inputs(graph)
    assert len(starts) == 3
    assert all(start.target is torch.ops.aten.add.Tensor for start in starts)
    everything = cuts(graph)
    assert all(start in everything for start in starts)


class Shared(nn.Module):
    """Attention that feeds attention, with the stream beside both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(0), Attention(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_layers_that_share_more_than_a_stream_are_refused() -> None:
    graph = plainly_paired(lambda: Decoder(Shared())).graphs[SPARSE].graph
    with pytest.raises(UnsupportedModelError, match="no single value leads into layer 1"):
        layer_inputs(graph)
