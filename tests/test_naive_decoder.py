"""The runtime against an independent naive decoder, on the shipped model."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaForCausalLM

from sirius_compile import CompileConfig, compile_model
from sirius_compile.models import shipped_models
from sirius_compile.shipped.problems import Task, problems
from tests.support.naive_decoder import Sparsity, naive_sirius

PROMPTS = 30
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    tasks = [(Task.REASONING, 20), (Task.UNDERSTANDING, 10)]
    return [
        p.prompt for task, n in tasks for p in itertools.islice(problems(task, "test", seed=5), n)
    ]


@pytest.mark.parametrize(("method", "keep"), [("griffin", 0.4), ("topk", 0.05), ("cats", 0.05)])
def test_same_tokens_as_the_naive_decoder(method: str, keep: float, prompts: list[str]) -> None:
    compiled = compile_model("tally-3m", CompileConfig(sparsity=method, keep=keep))
    model = compiled.to_runtime(dtype="float32")
    reference = LlamaForCausalLM.from_pretrained(shipped_models()["tally-3m"], dtype=torch.float32)
    sparse = compiled.spec.sparsity
    sparsity = Sparsity(method, sparse.kept[0], sparse.thresholds)
    sparsity.patch(reference)
    corrections = 0
    assert len(prompts) == PROMPTS
    for prompt in prompts:
        output = model.generate(prompt, max_new_tokens=NEW_TOKENS)
        expected = naive_sirius(
            reference,
            sparsity,
            list(output.prompts[0]),
            period=16,
            threshold=0.1,
            temperature=0.6,
            max_new_tokens=NEW_TOKENS,
            eos=set(compiled.spec.eos_token_ids),
        )
        assert list(output.tokens[0]) == expected
        corrections += output.stats.corrections
    assert corrections > 0  # else the prompts never exercised the verification
