"""Each processor of logits beside transformers' own, on sequences of every length at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from sirius_runtime.errors import ConfigError, GenerationError
from sirius_runtime.logits import History, node_histories, processors
from sirius_runtime.logits_options import LogitsOptions, LogitsSpec, check_processors, merged
from sirius_runtime.sampling import Sampling
from sirius_runtime.tree import Level, attach, plant

VOCABULARY, LONGEST, NEW = 9, 14, 12
EOS = frozenset({2, 5})
ENDS = torch.tensor(sorted(EOS))

BIASES: Any = [[[3], 2.5], [[1, 4], -1.25], [[2, 4], 0.1], [[1, 1, 4], 0.7]]

Made = Callable[[Tensor, int], list[Any]]
"""transformers' processors of a sequence, by its prompt [1, T] and the prompt's length."""

CASES: dict[str, tuple[LogitsOptions, Made]] = {
    "sequence_bias": (
        {"sequence_bias": BIASES},
        lambda ids, n: [
            hf.SequenceBiasLogitsProcessor(
                [[[3], 2.5], [[1, 4], -1.25], [[2, 4], 0.1], [[1, 1, 4], 0.7]]
            )
        ],
    ),
    "encoder_repetition_penalty": (
        {"encoder_repetition_penalty": 1.3},
        lambda ids, n: [hf.EncoderRepetitionPenaltyLogitsProcessor(1.3, ids)],
    ),
    "repetition_penalty": (
        {"repetition_penalty": 1.3},
        lambda ids, n: [hf.RepetitionPenaltyLogitsProcessor(1.3)],
    ),
    **{
        f"no_repeat_ngram_size {size}": (
            {"no_repeat_ngram_size": size},
            lambda ids, n, size=size: [hf.NoRepeatNGramLogitsProcessor(size)],
        )
        for size in (1, 2, 3, 20)
    },
    **{
        f"encoder_no_repeat_ngram_size {size}": (
            {"encoder_no_repeat_ngram_size": size},
            lambda ids, n, size=size: [hf.EncoderNoRepeatNGramLogitsProcessor(size, ids)],
        )
        for size in (1, 2)
    },
    "bad_words_ids": (
        {"bad_words_ids": [[2], [3], [1, 4], [4, 4, 2]]},
        lambda ids, n: [hf.NoBadWordsLogitsProcessor([[2], [3], [1, 4], [4, 4, 2]], ENDS)],
    ),
    "min_length": (
        {"min_length": 7},
        lambda ids, n: [hf.MinLengthLogitsProcessor(7, ENDS)],
    ),
    "min_new_tokens": (
        {"min_new_tokens": 3, "min_length": 12},
        lambda ids, n: [hf.MinNewTokensLengthLogitsProcessor(n, 3, ENDS)],
    ),
    "forced_bos_token_id": (
        {"forced_bos_token_id": 6},
        lambda ids, n: [hf.ForcedBOSTokenLogitsProcessor(6)],
    ),
    "forced_eos_token_id": (
        {"forced_eos_token_id": [2, 5]},
        lambda ids, n: [hf.ForcedEOSTokenLogitsProcessor(n + NEW, [2, 5])],
    ),
    "remove_invalid_values": (
        {"remove_invalid_values": True},
        lambda ids, n: [hf.InfNanRemoveLogitsProcessor()],
    ),
    "exponential_decay_length_penalty": (
        {"exponential_decay_length_penalty": (2, 1.37)},
        lambda ids, n: [hf.ExponentialDecayLengthPenalty((2, 1.37), ENDS, n)],
    ),
    "suppress_tokens": (
        {"suppress_tokens": [1, 8]},
        lambda ids, n: [hf.SuppressTokensLogitsProcessor([1, 8])],
    ),
    "begin_suppress_tokens": (
        {"begin_suppress_tokens": [1, 8]},
        lambda ids, n: [hf.SuppressTokensAtBeginLogitsProcessor([1, 8], n)],
    ),
    "begin_suppress_tokens after forced_bos_token_id": (
        {"begin_suppress_tokens": [1, 8], "forced_bos_token_id": 6},
        lambda ids, n: [
            hf.ForcedBOSTokenLogitsProcessor(6),
            hf.SuppressTokensAtBeginLogitsProcessor([1, 8], n if n > 1 else n + 1),
        ],
    ),
    "renormalize_logits": (
        {"renormalize_logits": True},
        lambda ids, n: [hf.LogitNormalization()],
    ),
    "in order": (
        {
            "renormalize_logits": True,
            "suppress_tokens": [8],
            "exponential_decay_length_penalty": (2, 1.1),
            "bad_words_ids": [[1, 1]],
            "no_repeat_ngram_size": 3,
            "repetition_penalty": 1.2,
            "sequence_bias": [[[3], 2.5]],
        },
        lambda ids, n: [
            hf.SequenceBiasLogitsProcessor([[[3], 2.5]]),
            hf.RepetitionPenaltyLogitsProcessor(1.2),
            hf.NoRepeatNGramLogitsProcessor(3),
            hf.NoBadWordsLogitsProcessor([[1, 1]], ENDS),
            hf.ExponentialDecayLengthPenalty((2, 1.1), ENDS, n),
            hf.SuppressTokensLogitsProcessor([8]),
            hf.LogitNormalization(),
        ],
    ),
}


def sequences(seed: int) -> History:
    """One sequence of every length, of few tokens, so that runs repeat; what follows is nothing."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.arange(1, LONGEST + 1)
    tokens = torch.randint(1, 6, (LONGEST, LONGEST + 2), generator=generator)
    prompts = (torch.rand(LONGEST, generator=generator) * lengths).long() + 1
    return History(tokens, lengths, prompts)


def processed(options: LogitsOptions, scores: Tensor, history: History) -> Tensor:
    spec = merged(options, LogitsSpec(), VOCABULARY)
    every = processors(
        spec, (), eos=EOS, max_new_tokens=NEW, vocabulary=VOCABULARY, device=torch.device("cpu")
    )
    assert every
    for process in every:
        scores = process(scores, history)
    return scores


@pytest.mark.parametrize("case", CASES)
def test_a_processor_is_transformers_own_to_the_last_bit(case: str) -> None:
    options, made = CASES[case]
    changed = 0
    for seed in range(8):
        history = sequences(seed)
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(LONGEST, VOCABULARY, generator=generator) * 5
        if case == "remove_invalid_values":
            scores[:, :3] = torch.tensor([math.nan, math.inf, -math.inf])
        found = processed(options, scores.clone(), history)
        for row, (length, prompt) in enumerate(
            zip(history.lengths.tolist(), history.prompts.tolist(), strict=True)
        ):
            ids, wanted = history.tokens[row : row + 1, :length], scores[row : row + 1].clone()
            for processor in made(ids[:, :prompt], prompt):
                wanted = processor(ids, wanted)
            assert torch.equal(found[row], wanted[0]), (seed, row)
            changed += not torch.equal(found[row], scores[row])
    assert changed or case == "no_repeat_ngram_size 20"  # no sequence is as long


def test_a_node_s_history_is_what_is_committed_and_its_path() -> None:
    """A tree of width 2, the row's root 30 or 50: 0, then 1 and 2, 3 above 2, 4 above 1."""
    tree = plant(torch.tensor([30, 50]), 3, 2)
    for level, tokens, parents in ((1, [1, 2], [0, 0]), (2, [3, 4], [2, 1])):
        new = Level(*(torch.tensor([row, row]) for row in (tokens, parents)), torch.zeros(2, 2))
        tree = attach(tree, new, torch.tensor(level))
    committed = History(
        torch.tensor([[10, 11, 30, 99, 99, 99], [50, 99, 99, 99, 99, 99]]),
        torch.tensor([3, 1]),
        torch.tensor([2, 1]),
    )
    every = node_histories(committed, tree, torch.arange(5))
    pairs = zip(every.tokens.tolist(), every.lengths.tolist(), strict=True)
    paths = [[], [1], [2], [2, 3], [1, 4]]
    assert [tokens[:length] for tokens, length in pairs] == [
        before + path for before in ([10, 11, 30], [50]) for path in paths
    ]
    assert every.prompts.tolist() == [2] * 5 + [1] * 5
    some = node_histories(committed, tree, torch.tensor([3, 0]))
    assert torch.equal(some.lengths, every.lengths[[3, 0, 8, 5]])


def test_a_callable_sees_each_length_without_padding() -> None:
    history, seen = sequences(0), []
    history = history._replace(lengths=history.lengths % 3 + 1)

    def note(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append((ids, scores.shape))
        scores[:, 0] = ids.sum(1).float()
        return scores

    every = processors(
        LogitsSpec(),
        [note],
        eos=EOS,
        max_new_tokens=NEW,
        vocabulary=VOCABULARY,
        device=torch.device("cpu"),
    )
    scores = torch.zeros(LONGEST, VOCABULARY)
    (process,) = every
    found = process(scores, history)
    assert [ids.shape[1] for ids, _ in seen] == [1, 2, 3]
    assert sum(len(ids) for ids, _ in seen) == LONGEST
    sums = [
        sum(tokens[:n])
        for tokens, n in zip(history.tokens.tolist(), history.lengths.tolist(), strict=True)
    ]
    assert found[:, 0].tolist() == sums
    assert not scores.any()  # what was given stays


@pytest.mark.parametrize("wrong", [lambda ids, scores: None, lambda ids, scores: scores[:, :-1]])
def test_a_callable_that_returns_something_else_is_refused(wrong: Any) -> None:
    (process,) = processors(
        LogitsSpec(),
        [wrong],
        eos=EOS,
        max_new_tokens=NEW,
        vocabulary=VOCABULARY,
        device=torch.device("cpu"),
    )
    with pytest.raises(GenerationError, match=r"must return scores of shape \[1, 9\]"):
        process(
            torch.zeros(1, VOCABULARY),
            History(*torch.ones(3, 1, 1).long().unbind(0))._replace(
                lengths=torch.ones(1).long(), prompts=torch.ones(1).long()
            ),
        )


REFUSED: list[tuple[str, Any, str]] = [
    ("repetition_penalty", 0.0, "must be a number > 0"),
    ("repetition_penalty", math.nan, "must be a number > 0"),
    ("repetition_penalty", "1.1", "must be a number > 0"),
    ("repetition_penalty", True, "must be a number > 0"),
    ("repetition_penalty", 10**400, "must be a number > 0"),
    ("no_repeat_ngram_size", -1, "must be an integer in 0"),
    ("no_repeat_ngram_size", 2.0, "must be an integer in 0"),
    ("min_new_tokens", 2**40, "must be an integer in 0"),
    ("remove_invalid_values", 1, "must be True or False"),
    ("suppress_tokens", [101], r"outside of the vocabulary \(0..100\)"),
    ("suppress_tokens", [-1], "outside of the vocabulary"),
    ("suppress_tokens", "12", "must be a list of token ids"),
    ("suppress_tokens", [1.5], "must be a list of token ids"),
    ("begin_suppress_tokens", [[1]], "must be a list of token ids"),
    ("bad_words_ids", [1, 2], "must be lists of token ids"),
    ("bad_words_ids", [[]], "must be lists of token ids"),
    ("bad_words_ids", [[1, 500]], "outside of the vocabulary"),
    ("sequence_bias", {(): 1.0}, "must be {"),
    ("sequence_bias", {1: 1.0}, "must be {"),
    ("sequence_bias", [[1, 2, 3]], "must be {"),
    ("sequence_bias", {(1,): math.inf}, "must have finite biases"),
    ("sequence_bias", {(1, 101): 1.0}, "outside of the vocabulary"),
    ("forced_bos_token_id", [1, 2], "must be one token id"),
    ("forced_eos_token_id", 101, "outside of the vocabulary"),
    ("exponential_decay_length_penalty", (1.5, 2.0), "must be .tokens >= 0, factor > 0"),
    ("exponential_decay_length_penalty", (1, 0.0), "must be .tokens >= 0, factor > 0"),
    ("exponential_decay_length_penalty", 3, "must be .tokens >= 0, factor > 0"),
]


@pytest.mark.parametrize(("name", "value", "reason"), REFUSED, ids=str)
def test_a_value_out_of_range_is_refused_by_name(name: Any, value: Any, reason: str) -> None:
    options: Any = {name: value}
    with pytest.raises(ConfigError, match=rf"^{name} .*{reason}"):
        merged(options, LogitsSpec(), 101)


def test_options_go_before_defaults_and_can_switch_them_off() -> None:
    default = merged(
        {
            "repetition_penalty": 1.1,
            "suppress_tokens": [3],
            "forced_bos_token_id": 4,
            "min_new_tokens": 3,
            "exponential_decay_length_penalty": (1, 2.0),
        },
        LogitsSpec(),
        101,
    )
    assert merged({"repetition_penalty": None}, default, 101) == default
    off: LogitsOptions = {
        "repetition_penalty": 1.0,
        "suppress_tokens": [],
        "forced_bos_token_id": [],
        "min_new_tokens": 0,
        "exponential_decay_length_penalty": [],
    }
    assert merged(off, default, 101).changes_nothing
    assert not default.changes_nothing
    # The artifact's own least number of new tokens does not hide a length that is asked for.
    asked = merged({"min_length": 9}, default, 101)
    assert (asked.min_length, asked.min_new_tokens) == (9, None)


def test_numpy_s_integers_are_token_ids() -> None:
    ids = list(np.array([3, 4]))
    spec = merged({"suppress_tokens": ids, "forced_bos_token_id": ids[0]}, LogitsSpec(), 101)
    assert spec.suppress_tokens == (3, 4)
    assert spec.forced_bos_token_id == 3


def test_an_unknown_option_is_no_option() -> None:
    options: Any = {"repetition_penality": 1.1}
    with pytest.raises(TypeError, match="unexpected keyword argument 'repetition_penality'"):
        merged(options, LogitsSpec(), 101)


def test_what_can_t_be_called_is_no_processor() -> None:
    with pytest.raises(ConfigError, match=r"must be callables .*, got str"):
        check_processors(["x"])
    one = lambda ids, scores: scores  # noqa: E731
    assert check_processors(one) == check_processors([one]) == (one,)


@pytest.mark.parametrize(
    "cuts",
    [
        {"min_p": 0.1},
        {"typical_p": 0.7},
        {"typical_p": 1e-6},
        {"min_p": 0.02, "typical_p": 0.9},
        {"top_k": 6, "min_p": 0.05, "typical_p": 0.8},
        {"top_k": 7, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_sampling_cuts_as_transformers_does(cuts: dict[str, Any]) -> None:
    scores = torch.randn(400, 23, generator=torch.Generator().manual_seed(3)) * 2
    wanted = scores / 1.3
    for name, warper in (
        ("top_k", hf.TopKLogitsWarper),
        ("top_p", hf.TopPLogitsWarper),
        ("min_p", hf.MinPLogitsWarper),
        ("typical_p", hf.TypicalLogitsWarper),
    ):
        if name in cuts:
            wanted = warper(cuts[name])(torch.zeros(400, 1).long(), wanted)
    found = Sampling(1.3, **cuts).distribution(scores)
    assert torch.allclose(found, wanted.softmax(-1), atol=1e-6)
    assert not Sampling(1.3, **cuts).fits_graph


@pytest.mark.parametrize("wrong", [{"min_p": -0.1}, {"min_p": 1.5}, {"typical_p": 0.0}], ids=str)
def test_cuts_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"^{name} must be in"):
        Sampling(**wrong)
