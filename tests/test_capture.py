"""What capture refuses, and in which words."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sirius_compile.capture import capture
from sirius_compile.pipeline import front
from sirius_passes.manager import run_passes
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.spec import Method

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt_oss", "GptOssAttention: attention sinks are not supported"),
        ("llama4_text", "chunked or blockwise attention is not supported"),
        ("bloom", "model type 'bloom' can't be captured"),
    ],
)
def test_attention_that_can_not_be_expressed_is_refused(model_type: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        capture(AutoConfig.for_model(model_type, **SMALL))


@pytest.mark.parametrize("model_type", ["opt", "mixtral"])
def test_a_model_without_dense_mlps_is_refused_by_the_sparse_methods(model_type: str) -> None:
    program = capture(AutoConfig.for_model(model_type, **SMALL)).program
    with pytest.raises(UnsupportedModelError, match="no gated MLP was found"):
        run_passes(program, front(Method.TOPK))


def test_the_config_of_the_caller_s_model_stays_as_it_was() -> None:
    """A model in memory goes on as it was: with its own attention, saved as of its own dtype."""
    config = AutoConfig.for_model("llama", **SMALL)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    before = model.config.to_dict()
    capture(model.config)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == before
