"""Rotary embeddings beyond the original training length, against transformers."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sirius_compile import CompileConfig, compile_model
from sirius_compile.capture import capture
from sirius_compile.rope import longest_sequence, max_seq_len, rope_warnings
from sirius_runtime.errors import ConfigError, UnsupportedModelError
from tests.support.families import (
    Caches,
    Pair,
    assert_close,
    padded,
    random_model,
    random_rows,
    small_config,
)
from tests.support.fast import slow_but

ORIGINAL = 16
ROWS = random_rows(30, 12, 25)  # beyond it, within it, beyond it
COUNTS = torch.tensor([len(row) for row in ROWS])
EXTENDED = {"original_max_position_embeddings": ORIGINAL, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
KINDS: dict[str, dict[str, object]] = {
    "linear": {"factor": 4.0},
    "llama3": {**EXTENDED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": EXTENDED,
    "dynamic": {"factor": 4.0},
    "longrope": LONGROPE,
}


def changes(kind: str, model_type: str) -> dict[str, object]:
    """A config's fields for this kind of rotary embedding; Gemma 3 has one for each layer type."""
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **KINDS[kind]}
    length = ORIGINAL if kind == "dynamic" else 64
    if model_type == "gemma3_text":
        other = {"rope_type": "default", "rope_theta": 10000.0}
        both = {"full_attention": parameters, "sliding_attention": other}
        return {"rope_parameters": both, "max_position_embeddings": length}
    return {"rope_parameters": parameters, "max_position_embeddings": length}


def one_by_one(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Logits [T, V] of transformers decoding token by token with its cache."""
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for position, token in enumerate(tokens):
            output = model(
                input_ids=torch.tensor([[token]]),
                position_ids=torch.tensor([[position]]),
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(output.logits[0, 0])
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("kind", "model_type"),
    slow_but(
        product(KINDS, ("llama", "gemma3_text")),
        (),
        {("longrope", "llama"), ("yarn", "gemma3_text")},
    ),
)
def test_beyond_the_original_length(kind: str, model_type: str) -> None:
    own = changes(kind, model_type)
    compiled = compile_model(
        random_model(model_type, **own), CompileConfig(sparsity="topk", graphs="entries")
    )
    pair = Pair(random_model(model_type, **own), compiled.to_runtime())
    expected = [
        one_by_one(pair.model, row) if kind == "dynamic" else pair.reference(row) for row in ROWS
    ]
    whole = Caches(pair.backend, len(ROWS)).feed(padded(ROWS), COUNTS)
    in_parts = Caches(pair.backend, len(ROWS))
    first = COUNTS // 2
    in_parts.feed(padded([row[:n] for row, n in zip(ROWS, first, strict=True)]), first, "prefill")
    rest = [row[n:] for row, n in zip(ROWS, first, strict=True)]
    second = in_parts.feed(padded(rest), COUNTS - first)
    for row, wanted in enumerate(expected):
        assert_close(whole[row, : COUNTS[row]], wanted)
        assert_close(second[row, : len(rest[row])], wanted[first[row] :])


@pytest.mark.parametrize(
    ("kind", "longest"), [("linear", 64), ("dynamic", 64), ("longrope", 32), ("yarn", 64)]
)
def test_the_longest_sequence(kind: str, longest: int) -> None:
    assert longest_sequence(small_config("llama", **changes(kind, "llama"))).tokens == longest


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (
            "yarn",
            r"64 \(max_position_embeddings of config\.json; for up to 64 tokens \(rope",
        ),
        ("linear", r"64 \(max_position_.*for up to 256 .*, raise max_position_embeddings in"),
        ("dynamic", r"64 \(max_position_embeddings of config\.json times the factor of rope_type"),
        (
            "longrope",
            r"32 \(original_max_position_embeddings of .* longer texts are not sup",
        ),
    ],
)
def test_the_limit_says_what_sets_it(kind: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"--max-seq-len must be in 2\.\.{why}.*, got 300"):
        max_seq_len(small_config("llama", **changes(kind, "llama")), 300)


@pytest.mark.parametrize(
    ("kind", "length", "said"),
    [
        (
            "yarn",
            32,
            "texts are limited to 32 tokens; for up to 64 tokens (rope_type",
        ),
        ("dynamic", ORIGINAL, "rope_type dynamic: beyond 16 tokens, each token"),
    ],
)
def test_what_a_user_should_know(kind: str, length: int, said: str) -> None:
    config = small_config("llama", **changes(kind, "llama") | {"max_position_embeddings": length})
    (warning,) = rope_warnings(config)
    assert warning.startswith(said)


@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3", "longrope"])
def test_where_there_is_nothing_to_know(kind: str) -> None:
    assert list(rope_warnings(small_config("llama", **changes(kind, "llama")))) == []


def test_longrope_beyond_its_original_length_is_refused() -> None:
    model = random_model("llama", **changes("longrope", "llama"))
    with pytest.raises(ConfigError, match=r"--max-seq-len must be in 2..32 .*, got 33"):
        compile_model(model, CompileConfig(sparsity="topk", max_seq_len=33, graphs="entries"))


def test_longrope_serves_its_original_length_unless_told() -> None:
    model = random_model("llama", **changes("longrope", "llama"))
    compiled = compile_model(model, CompileConfig(sparsity="none", graphs="entries"))
    assert compiled.spec.model.max_seq_len == 32


def test_a_layout_of_angles_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def reversed_angles(self: LlamaRotaryEmbedding, x: Tensor, position_ids: Tensor) -> object:
        angles = position_ids[..., None] * self.inv_freq.flip(-1)
        return angles.cos(), angles.sin()

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", reversed_angles)
    reason = "LlamaRotaryEmbedding: its dynamic rotary frequencies have an unknown layout"
    with pytest.raises(UnsupportedModelError, match=reason):
        capture(small_config("llama", **changes("dynamic", "llama")))
