"""The runtime against an independent naive decoder, on the shipped model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from sirius_compile import CompileConfig, compile_model
from sirius_compile.models import shipped_models
from sirius_compile.shipped.problems import Task, problems
from sirius_runtime import GenerationOutput
from tests.support.fast import slow_but
from tests.support.naive_decoder import Sparsity, Written, naive_sirius, naive_sirius_tree

PROMPTS = 30
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    tasks = [(Task.REASONING, 20), (Task.UNDERSTANDING, 10)]
    return [
        p.prompt for task, n in tasks for p in itertools.islice(problems(task, "test", seed=5), n)
    ]


class Both:
    """The shipped model compiled, and as the naive decoder runs it."""

    def __init__(self, method: str, keep: float) -> None:
        compiled = compile_model(
            "tally-3m", CompileConfig(sparsity=method, keep=keep, graphs="entries")
        )
        self.model = compiled.to_runtime(dtype="float32")
        self._reference = LlamaForCausalLM.from_pretrained(
            shipped_models()["tally-3m"], dtype=torch.float32
        )
        spec = compiled.spec.sparsity
        self._sparsity = Sparsity(method, spec.sites)
        self._sparsity.patch(self._reference)

    def ids(self, prompt: str) -> list[int]:
        assert self.model.tokenizer is not None
        return list(self.model.tokenizer.encode(prompt).ids)

    def naive(self, decode: Callable[..., Written], prompt: list[int], **options: Any) -> Written:
        return decode(
            self._reference,
            self._sparsity,
            prompt,
            max_new_tokens=NEW_TOKENS,
            eos=set(self.model.program.eos_token_ids),
            **options,
        )


def assert_same(output: GenerationOutput, expected: Written) -> None:
    assert list(output.tokens[0]) == expected.tokens
    assert output.stats.advances == Counter(expected.advances)


@pytest.mark.parametrize(
    ("method", "keep"),
    slow_but([("griffin", 0.4), ("topk", 0.05), ("cats", 0.05)], {("griffin", 0.4)}),
)
@pytest.mark.parametrize("stride", slow_but((3, 5), (), {5}))
def test_same_tokens_as_the_naive_decoder(
    method: str, keep: float, stride: int, prompts: list[str]
) -> None:
    both = Both(method, keep)
    corrections = 0
    assert len(prompts) == PROMPTS
    for prompt in prompts[::stride]:
        ids = both.ids(prompt)
        output = both.model.generate(ids, max_new_tokens=NEW_TOKENS)
        assert_same(
            output, both.naive(naive_sirius, ids, period=16, threshold=0.1, temperature=0.6)
        )
        corrections += output.stats.corrections
    assert corrections > 0  # else the prompts never exercised the verification


# Drafts that are often wrong, and a verification that lets other tokens than its own pass: here
# a tree writes other tokens than a chain.
WRONG = ("griffin", 0.2)
LENIENT = {"period": 8, "threshold": 0.02}
WARM = 4.0
BRANCHING = (0, 14, 26)


@pytest.fixture(scope="module")
def wrong() -> Both:
    return Both(*WRONG)


@pytest.mark.parametrize("width", slow_but((2, 4), (), {2}))
def test_same_tokens_as_the_naive_tree_decoder(wrong: Both, prompts: list[str], width: int) -> None:
    branched = 0
    for ids in (wrong.ids(prompts[index]) for index in BRANCHING):
        tree, chain = (
            wrong.model.generate(
                ids, tree_width=w, verify_temperature=WARM, max_new_tokens=NEW_TOKENS, **LENIENT
            )
            for w in (width, 1)
        )
        assert_same(
            tree, wrong.naive(naive_sirius_tree, ids, width=width, temperature=WARM, **LENIENT)
        )
        assert tree.stats.corrections > 0
        branched += tree.tokens != chain.tokens
    assert branched > 1


@pytest.mark.gate
def test_the_naive_tree_of_width_one_is_the_naive_chain(wrong: Both, prompts: list[str]) -> None:
    """Two programs that check each other: one overwrites sparse K/V, the other keeps none."""
    for ids in (wrong.ids(prompts[index]) for index in BRANCHING[:2]):
        chain = wrong.naive(naive_sirius, ids, temperature=WARM, **LENIENT)
        tree = wrong.naive(naive_sirius_tree, ids, width=1, temperature=WARM, **LENIENT)
        assert tree == chain
