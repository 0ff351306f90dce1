"""Multimodal checkpoints: the text model is compiled, and the rest is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    PixtralVisionConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    SiglipVisionConfig,
)

from sirius_compile import CompileConfig, compile_model
from sirius_compile.capture import Wanted
from sirius_compile.checkpoint import checkpoint_dtype, open_weights
from sirius_compile.models import ModelSource, load_config
from sirius_compile.text_model import text_names
from sirius_runtime import Mode
from sirius_runtime.errors import UnsupportedModelError
from tests.support.families import SMALL, random_rows

TEXT = {name: value for name, value in SMALL.items() if name != "head_dim"}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llava": lambda: LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT)
    ),
    "llava-mixtral": lambda: LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
    ),
    "gemma3": lambda: Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=Gemma3TextConfig(**SMALL, layer_types=["full_attention"] * 2),
        mm_tokens_per_image=4,
    ),
    "mistral3": lambda: Mistral3Config(
        vision_config=PixtralVisionConfig(**VISION, head_dim=16), text_config=MistralConfig(**TEXT)
    ),
}


def saved(config: PretrainedConfig, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config.image_token_index = 100
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_text_models_weights_are_found(kind: str, tmp_path: Path) -> None:
    whole = saved(CONFIGS[kind](), tmp_path, torch.bfloat16)
    source = ModelSource(tmp_path, "a-model", None, False)
    config = load_config(source)
    assert config.model_type == whole.config.text_config.model_type
    assert checkpoint_dtype(source, config) is torch.bfloat16
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in text.named_parameters()}
    tied = {"model.embed_tokens.weight": ("lm_head.weight",)}
    aliases = tied if config.tie_word_embeddings else {}
    wanted = Wanted(shapes, aliases, frozenset(text.state_dict()), base=text.base_model_prefix)
    warnings: list[str] = []
    weights = open_weights(source, config, wanted, warnings.append)
    expected = dict(whole.model.language_model.named_parameters())
    expected |= {"lm_head.weight": whole.lm_head.weight}
    for name in shapes:
        assert torch.equal(weights.get(name), expected[name.removeprefix("model.")]), name
    (warning,) = warnings
    assert warning.startswith("a-model is multimodal: only its text model")
    assert "(multi_modal_projector, vision_tower)" in warning


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_it_writes_what_the_whole_model_writes(kind: str, tmp_path: Path) -> None:
    whole = saved(CONFIGS[kind](), tmp_path, torch.float32)
    compiled = compile_model(tmp_path, CompileConfig(sparsity="topk"))
    assert compiled.warnings
    (prompt,) = random_rows(9)
    output = compiled.to_runtime().generate(
        [prompt], mode=Mode.EXACT, max_new_tokens=12, eos_token_id=[]
    )
    greedy = whole.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert list(output.tokens[0]) == greedy[0, len(prompt) :].tolist()


def test_a_text_model_that_transformers_can_not_make_alone(tmp_path: Path) -> None:
    Qwen2VLConfig().save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError,
        match=r"\(model type 'qwen2_vl'\) is multimodal, and its text model \(model type "
        r"'qwen2_vl_text'\) has no causal language model of its own",
    ):
        load_config(ModelSource(tmp_path, "a-model", None, False))


def test_a_whole_model_in_memory_is_told_where_to_go() -> None:
    model = AutoModelForImageTextToText.from_config(CONFIGS["llava"]())
    with pytest.raises(UnsupportedModelError, match="is multimodal; save it by save_pretrained"):
        compile_model(model)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model.", ""])
def test_names_are_found_under_any_prefix(prefix: str) -> None:
    ends = ["layers.0.mlp.up_proj.weight", "layers.0.self_attn.q_proj.weight"]
    vision = ["vision_tower.encoder.layers.0.self_attn.q_proj.weight"]
    names = [f"model.{end}" for end in ends]
    stored = [f"{prefix}{end}" for end in ends]
    found, there = text_names(
        [*stored, *vision, "lm_head.weight"], [*names, "lm_head.weight"], "model"
    )
    assert there == prefix
    assert found == dict(zip(stored, names, strict=True)) | {"lm_head.weight": "lm_head.weight"}
