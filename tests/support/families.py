"""A family under test: a tiny random model of a type, beside transformers' eager one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sirius_runtime import SiriusModel
from sirius_runtime.decoder import Backend
from tests.support.models import chain_mask

TOLERANCE = 1e-4
SMALL: dict[str, object] = {
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
_EXPERTS: dict[str, object] = {"num_local_experts": 6, "num_experts_per_tok": 3}
_LATENT: dict[str, object] = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_GROUPED: dict[str, object] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
# Windows shorter than the sequences, and multipliers that are not one: what is special must show.
CONFIGS: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": 7},
    "ministral": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo3": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "cohere": {"logit_scale": 0.5},
    "cohere2": {
        "logit_scale": 0.5,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "exaone4": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_inner": 96},
    "gpt_bigcode": {"n_inner": 96},
    "gptj": {"n_inner": 96, "rotary_dim": 8},
    "opt": {"ffn_dim": 96},
    "starcoder2": {"sliding_window": 6},
    "mixtral": _EXPERTS,
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 32,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "gpt_oss": {**_EXPERTS, "sliding_window": 6},
    "granitemoe": {
        **_EXPERTS,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "phimoe": {"num_local_experts": 6},
    "minicpm3": _LATENT,
    "glm4_moe": {**_GROUPED, "n_shared_experts": 1},
    "dots1": {**_GROUPED, "n_shared_experts": 1},
    "ernie4_5_moe": {
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 1,
    },
    "deepseek_v3": {**_LATENT, **_GROUPED},
    # refused
    "falcon": {"head_dim": None, "num_key_value_heads": None},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "deepseek_v2": {**_LATENT, **_GROUPED},
}
"""By model type, what differs from SMALL."""


@dataclass
class Pair:
    """A tiny random model of one family, and its compiled program."""

    model: PreTrainedModel
    compiled: SiriusModel

    @property
    def backend(self) -> Backend:
        return self.compiled.backend

    def reference(self, ids: list[int]) -> Tensor:
        """Logits [T, V] of transformers' eager attention, without a cache."""
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def small_config(model_type: str, **changes: object) -> PretrainedConfig:
    own = {**SMALL, **CONFIGS.get(model_type, {}), **changes}
    return AutoConfig.for_model(model_type, **{k: v for k, v in own.items() if v is not None})


def random_model(model_type: str, **changes: object) -> PreTrainedModel:
    """The same on each call: what is compiled and the reference share nothing."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        small_config(model_type, **changes),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)
    return model


class Caches:
    """A cache for ragged rows, driven through the `full` and `prefill` entries."""

    def __init__(
        self, backend: Backend, rows: int, slots: int = 64, dtype: torch.dtype = torch.float32
    ) -> None:
        state = backend.program.state
        shape = (state.layers, rows, state.kv_heads, slots)
        self.backend = backend
        self.k = torch.randn(*shape, state.key_dim).to(dtype)
        self.v = torch.randn(*shape, state.value_dim).to(dtype)
        self.length = torch.zeros(rows, dtype=torch.int64)

    def feed(self, ids_BT: Tensor, counts: Tensor, entry: str = "full") -> Tensor:
        """Runs one call; row b commits its first counts[b] tokens. Returns the logits."""
        slots = self.length[:, None] + torch.arange(ids_BT.shape[1])
        inputs = {
            "input_ids": ids_BT,
            "positions": slots,
            "slots": slots,
            "length": self.length,
            "tree_mask": chain_mask(ids_BT.shape[1])[None],
            "k_cache": self.k,
            "v_cache": self.v,
            "last": counts - 1,
            "valid": torch.arange(ids_BT.shape[1]) < counts[:, None],
        }
        uses = self.backend.program.entry(entry).inputs
        logits = self.backend.run(entry, {i.name: inputs[i.name] for i in uses})["logits"]
        self.length = self.length + counts
        return logits


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids


def random_rows(*lengths: int) -> list[list[int]]:
    """Random tokens that are not special."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(6, 101, (n,), generator=generator).tolist() for n in lengths]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
