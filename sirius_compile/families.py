"""The tested model types and the refused ones, as two literal tables.

`tests/test_families.py` compares every row of the first table with transformers' own model, and
checks the reason in every row of the second. `sirius-compile --list-models` prints both. The
compiler does not read them: a type in neither table compiles if the passes can handle its graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from rich.table import Table

from sirius_runtime.spec import JSON, Method, to_json


class Mlp(StrEnum):
    """The kind of a family's MLPs."""

    GATED = "gated"
    PLAIN = "plain"
    EXPERTS = "experts"
    BOTH = "gated, experts"


@dataclass(frozen=True)
class Family:
    """A supported model type: its models, its special features, and the methods that apply."""

    model_type: str
    models: str
    mlp: Mlp
    notable: str
    methods: tuple[Method, ...]


@dataclass(frozen=True)
class Refused:
    """A refused model type. `reason`: from the error message; `behind`: the cause in the model."""

    model_type: str
    models: str
    reason: str
    behind: str


_NEURONS = tuple(method for method in Method if method.for_dense_models)
_EXPERTS = tuple(method for method in Method if method.for_mixtures)
_GATED, _PLAIN, _MIXED, _BOTH = Mlp.GATED, Mlp.PLAIN, Mlp.EXPERTS, Mlp.BOTH

FAMILIES: tuple[Family, ...] = (
    # gated MLPs
    Family("llama", "Llama 2 to 3.3, SmolLM2, TinyLlama", _GATED, "RoPE scaling", _NEURONS),
    Family("mistral", "Mistral 7B, Nemo", _GATED, "sliding window", _NEURONS),
    Family("ministral", "Ministral 8B", _GATED, "sliding and full layers", _NEURONS),
    Family("qwen2", "Qwen2, Qwen2.5", _GATED, "QKV biases", _NEURONS),
    Family("qwen3", "Qwen3", _GATED, "QK norm", _NEURONS),
    Family("gemma", "Gemma", _GATED, "tied embeddings", _NEURONS),
    Family("gemma2", "Gemma 2", _GATED, "sliding and full layers, softcaps", _NEURONS),
    Family("gemma3_text", "Gemma 3 (text)", _GATED, "sliding and full layers, QK norm", _NEURONS),
    Family("phi3", "Phi-3, Phi-4", _GATED, "fused QKV and gate_up, longrope", _NEURONS),
    Family("smollm3", "SmolLM3", _GATED, "layers without RoPE", _NEURONS),
    Family("olmo", "OLMo", _GATED, "norms without weights", _NEURONS),
    Family("olmo2", "OLMo 2", _GATED, "norms after, QK norm", _NEURONS),
    Family("olmo3", "OLMo 3", _GATED, "sliding and full layers, QK norm", _NEURONS),
    Family("granite", "Granite 3", _GATED, "multipliers", _NEURONS),
    Family("cohere", "Command R", _GATED, "attention beside MLP, scaled logits", _NEURONS),
    Family("cohere2", "Command R7B", _GATED, "attention beside MLP, sliding window", _NEURONS),
    Family("glm", "GLM-4 9B", _GATED, "fused gate_up, partial RoPE", _NEURONS),
    Family("glm4", "GLM-4-0414", _GATED, "fused gate_up, norms before and after", _NEURONS),
    Family("stablelm", "StableLM 2", _GATED, "partial RoPE, layer norms", _NEURONS),
    Family("exaone4", "EXAONE 4", _GATED, "norms after, QK norm", _NEURONS),
    Family("helium", "Helium", _GATED, "interleaved RoPE", _NEURONS),
    Family("seed_oss", "Seed-OSS", _GATED, "QKV biases", _NEURONS),
    Family("hunyuan_v1_dense", "Hunyuan dense", _GATED, "QK norm after RoPE", _NEURONS),
    Family("ernie4_5", "ERNIE 4.5 dense", _GATED, "interleaved RoPE", _NEURONS),
    Family("minicpm3", "MiniCPM3", _GATED, "latent attention", _NEURONS),
    # plain MLPs
    Family("gpt2", "GPT-2", _PLAIN, "Conv1D, learned positions", _NEURONS),
    Family("opt", "OPT", _PLAIN, "ReLU, learned positions, flattened tokens", _NEURONS),
    Family("gpt_neox", "GPT-NeoX, Pythia", _PLAIN, "attention beside MLP, partial RoPE", _NEURONS),
    Family("gptj", "GPT-J", _PLAIN, "attention beside MLP, biased head", _NEURONS),
    Family("gpt_bigcode", "StarCoder, SantaCoder", _PLAIN, "one key/value head", _NEURONS),
    Family("starcoder2", "StarCoder2", _PLAIN, "biases, sliding window", _NEURONS),
    Family("phi", "Phi-1.5, Phi-2", _PLAIN, "attention beside MLP, partial RoPE", _NEURONS),
    Family("nemotron", "Nemotron-4, Minitron", _PLAIN, "squared ReLU, partial RoPE", _NEURONS),
    Family("arcee", "AFM 4.5B", _PLAIN, "squared ReLU", _NEURONS),
    Family("persimmon", "Persimmon", _PLAIN, "squared ReLU, QK norm", _NEURONS),
    Family("biogpt", "BioGPT", _PLAIN, "learned positions, scaled embeddings", _NEURONS),
    # mixtures of experts
    Family("mixtral", "Mixtral", _MIXED, "normalised router", _EXPERTS),
    Family("qwen3_moe", "Qwen3 A3B, A22B", _BOTH, "QK norm, some layers dense", _EXPERTS),
    Family("qwen2_moe", "Qwen1.5, Qwen2 MoE", _BOTH, "a shared expert", _EXPERTS),
    Family("olmoe", "OLMoE", _MIXED, "router not normalised, QK norm", _EXPERTS),
    Family("gpt_oss", "gpt-oss", _MIXED, "attention sinks, biases, clamped SwiGLU", _EXPERTS),
    Family("granitemoe", "Granite 3 MoE", _MIXED, "multipliers", _EXPERTS),
    Family("phimoe", "Phi-3.5 MoE", _MIXED, "router scores twice", (Method.TOPK,)),
    Family("glm4_moe", "GLM-4.5, GLM-4.6", _BOTH, "router in float32", (Method.TOPK,)),
    Family("dots1", "dots.llm1", _BOTH, "router in float32", (Method.TOPK,)),
    Family("ernie4_5_moe", "ERNIE 4.5 MoE", _BOTH, "router in float32", (Method.TOPK,)),
    Family("deepseek_v3", "DeepSeek-V3, R1", _BOTH, "latent attention", (Method.TOPK,)),
)
"""The supported model types; each row is tested."""

REFUSED: tuple[Refused, ...] = (
    Refused("bloom", "BLOOM", "takes no position_ids", "ALiBi"),
    Refused("mpt", "MPT", "takes no position_ids", "ALiBi"),
    Refused("mamba", "Mamba", "takes no position_ids", "a recurrent state"),
    Refused("rwkv", "RWKV", "takes no position_ids", "a recurrent state"),
    Refused(
        "falcon", "Falcon", "it has attention classes of its own", "ALiBi or RoPE, by its own code"
    ),
    Refused(
        "gpt_neo",
        "GPT-Neo",
        "it has attention classes of its own",
        "local attention, by its own code",
    ),
    Refused("jamba", "Jamba", "its forward works for some numbers of tokens only", "Mamba layers"),
    Refused(
        "recurrent_gemma",
        "RecurrentGemma",
        "its forward works for some numbers of tokens",
        "recurrent layers",
    ),
    Refused("lfm2", "LFM2", "the model's graph reads attention_mask", "convolutions over tokens"),
    Refused(
        "llama4_text",
        "Llama 4",
        "chunked or blockwise attention is not supported",
        "chunked attention",
    ),
    Refused("xglm", "XGLM", "it computes with the attention mask", "masks of its own"),
    Refused(
        "diffllama",
        "DiffLlama",
        "the cache needs layers 0, 1, … once each",
        "two attentions a layer",
    ),
    Refused("deepseek_v2", "DeepSeek-V2", "computes with complex numbers", "its rotary embedding"),
    Refused(
        "apertus",
        "Apertus",
        "no MLP was found",
        "an activation with weights; --sparsity none compiles it",
    ),
    Refused(
        "bitnet",
        "BitNet",
        "no MLP was found",
        "a norm inside its MLPs; --sparsity none compiles it",
    ),
    Refused("t5", "T5", "is an encoder-decoder", "so are all of its kind"),
    Refused("bert", "BERT", "is an encoder", "so are all of its kind"),
)
"""The refused model types; each reason is tested."""


def families_json() -> JSON:
    """Both tables as plain values."""
    return {"supported": to_json(FAMILIES), "refused": to_json(REFUSED)}


def families_tables() -> Iterator[Table]:
    """Both tables as text tables, for a terminal."""
    supported = _table("model type", "models", "MLPs", "notable", "--sparsity")
    for family in FAMILIES:
        methods = ", ".join(family.methods)
        supported.add_row(family.model_type, family.models, family.mlp, family.notable, methods)
    yield supported
    refused = _table("refused", "models", "because", "")
    for other in REFUSED:
        refused.add_row(other.model_type, other.models, other.reason, other.behind)
    yield refused


def _table(first: str, *others: str) -> Table:
    table = Table(box=None)
    table.add_column(first, no_wrap=True)  # so that a model type can be searched for
    for header in others:
        table.add_column(header)
    return table
