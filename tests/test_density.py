"""Density, from a real model's config alone: the paper's own numbers, and no weights needed."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from sirius_compile.capture import capture
from sirius_compile.pipeline import back, front
from sirius_passes.manager import run_passes
from sirius_runtime.spec import Method

LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
)


@pytest.mark.parametrize(("method", "density"), [(Method.GRIFFIN, 0.649), (Method.TOPK, 0.766)])
def test_llama_3_8b_at_half_the_neurons(method: Method, density: float) -> None:
    """arXiv 2409.03856: .65 and .76; captured without storage, so any machine can."""
    program = capture(LLAMA_3_8B).program
    # The last pass adds the period, which reads what its entries read, and takes long to trace.
    *passes, _ = back(method, 0.5, (), period=16, tree_width=1, max_seq_len=8192)
    run_passes(program, front(method) + passes)
    assert program.sparsity.density == pytest.approx(density, abs=5e-4)
    assert sum(len(w.shape) == 2 for w in program.weights.values()) == 32 * 7 + 2
