"""Capture of models' special features; `test_families` has the refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from sirius_compile.capture import capture
from sirius_passes.mixtures import mixtures
from sirius_passes.program import DENSE, calls
from sirius_runtime.errors import UnsupportedModelError
from tests.support.families import small_config
from tests.support.fast import slow_but

ATTENTION = torch.ops.sirius.attention.default


def test_experts_of_an_unknown_activation_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="MixtralExperts: its experts' activation is"):
        capture(small_config("mixtral", hidden_act="tanh"))


def test_a_clamp_of_another_limit_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="GptOssExperts: its experts' activation is"):
        capture(small_config("gpt_oss", swiglu_limit=5.0))


@pytest.mark.slow  # `test_families` runs a qwen2_moe and a deepseek_v3
def test_masks_that_no_layer_uses_are_not_looked_at() -> None:
    """qwen2_moe makes a mask with a window of 0 that none of its layers uses."""
    program = capture(small_config("qwen2_moe")).program
    windows = [node.args[5] for node in calls(program.graphs[DENSE].graph, ATTENTION)]
    assert windows == [None, None]


@pytest.mark.slow
def test_experts_know_their_layer() -> None:
    program = capture(small_config("qwen3_moe", num_hidden_layers=3)).program
    found = [mixture.layer for mixture in mixtures(program.graphs[DENSE].graph)]
    assert found == [1, 2]


@pytest.mark.parametrize(
    ("act", "name"),
    slow_but(
        [("silu", "silu"), ("gelu_new", "gelu_tanh"), ("relu2", "relu2"), ("quick_gelu",) * 2],
        (),
        {("gelu_new", "gelu_tanh")},
    ),
)
def test_experts_activations(act: str, name: str) -> None:
    program = capture(small_config("mixtral", hidden_act=act)).program
    found = {mixture.node.args[9] for mixture in mixtures(program.graphs[DENSE].graph)}
    assert found == {name}


def test_the_config_of_the_caller_s_model_stays_as_it_was() -> None:
    """Capture leaves a model in memory unchanged: its attention function and its dtype."""
    config = small_config("llama", num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    before = model.config.to_dict()
    capture(model.config)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    "dtype",
    slow_but((torch.float32, torch.bfloat16, torch.float16), (), {torch.bfloat16}),
    ids=str,
)
def test_constants_have_the_precision_of_the_program(dtype: torch.dtype) -> None:
    """Gemma scales embeddings by a root that bfloat16 rounds."""
    captured = capture(small_config("gemma3_text", hidden_size=48), dtype=dtype)
    (name,) = (name for name in captured.constants if "embed_scale" in name)
    assert torch.equal(captured.constants[name], torch.tensor(48**0.5, dtype=dtype))
    assert captured.program.weights[name].retype
    assert not captured.program.weights[name].parameter
