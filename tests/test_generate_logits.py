"""Processed logits through `generate`: transformers' tokens, on every back end; what is told."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from sirius_compile import CompileConfig, compile_model
from sirius_runtime import load
from sirius_runtime.errors import BackendError, ConfigError, GenerationError
from sirius_runtime.model import SiriusModel
from tests import test_generate_sampling as sampling
from tests.support.fast import slow_but
from tests.support.models import VOCABULARY, Tiny, TinyModels, random_decoder, word_tokenizer
from tests.support.onnx import load_onnx
from tests.support.statistics import LEVEL

RAGGED = [[7, 8, 9, 7, 8], [14, 50, 30, 11], [33]]
NEW = 16
SHAPES = [(1, 4), (4, 16), (4, 4), (1, 16)]
"""(tree_width, period)"""
OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"encoder_repetition_penalty": 1.5},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[36], [92, 49], [44]]},
    {"sequence_bias": [[[36], -20.0], [[92, 49], -50.0], [[68, 68], -30.0], [[7], 4.0]]},
    {"min_length": 12, "eos_token_id": [36, 92, 20]},
    {"min_new_tokens": 9, "eos_token_id": [36, 92, 20]},
    {"forced_bos_token_id": 45},
    {"forced_eos_token_id": [5]},
    {"exponential_decay_length_penalty": (3, 1.6)},
    {"suppress_tokens": [36, 92, 20]},
    {"begin_suppress_tokens": [36, 14, 44]},
    {
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 6,
        "begin_suppress_tokens": [36, 14],
        "renormalize_logits": True,
        "remove_invalid_values": True,
    },
]
MATRIX = [
    pytest.param(
        options,
        *shape,
        marks=() if index % len(SHAPES) == place else pytest.mark.slow,
        id=f"{'+'.join(options)}-{shape[0]}-{shape[1]}",
    )
    for index, options in enumerate(OPTIONS)
    for place, shape in enumerate(SHAPES)
]


@pytest.fixture(scope="module")
def subject(tiny: TinyModels) -> Tiny:
    return tiny(method="topk")


def transformers_tokens(tiny: Tiny, prompt: list[int], **options: Any) -> tuple[int, ...]:
    """Of transformers' own greedy `generate`; each row alone, as no padding has a part."""
    with torch.no_grad():
        output = tiny.reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=NEW,
            **options,
        )
    return tuple(output[0, len(prompt) :].tolist())


@pytest.fixture(scope="module")
def plain(subject: Tiny) -> list[tuple[int, ...]]:
    return [transformers_tokens(subject, row) for row in RAGGED]


@pytest.mark.parametrize(("options", "width", "period"), MATRIX)
def test_exact_is_transformers_greedy_under_the_same_options(
    subject: Tiny,
    plain: list[tuple[int, ...]],
    options: dict[str, Any],
    width: int,
    period: int,
) -> None:
    wanted = [transformers_tokens(subject, row, **options) for row in RAGGED]
    assert wanted != plain
    found = subject.model.generate(
        RAGGED, mode="exact", period=period, tree_width=width, max_new_tokens=NEW, **options
    )
    assert list(found.tokens) == wanted


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3], OPTIONS[-1]], ids=str)
def test_so_is_the_full_path_token_by_token(subject: Tiny, options: dict[str, Any]) -> None:
    wanted = [transformers_tokens(subject, row, **options) for row in RAGGED]
    found = subject.model.generate(RAGGED, mode="full", max_new_tokens=NEW, **options)
    assert list(found.tokens) == wanted


def test_drafts_are_processed_too(tiny: TinyModels) -> None:
    """A sparse path that is the full one is never refused, whatever the logits become."""
    model = tiny(method="none").model
    stats = model.generate(
        RAGGED, mode="exact", period=4, max_new_tokens=NEW, no_repeat_ngram_size=1
    ).stats
    assert stats.acceptance_rate == 1.0


def test_the_threshold_judges_processed_logits(tiny: TinyModels) -> None:
    """A sure path under the usual rule: what is forbidden is neither drafted nor committed."""
    model = tiny(method="topk").model
    plain = model.generate(RAGGED, mode="sirius", max_new_tokens=NEW).tokens
    forbidden = sorted({token for row in plain for token in row})[:20]
    for threshold in (0.0, 0.1, 2.0):
        found = model.generate(
            RAGGED, threshold=threshold, max_new_tokens=NEW, suppress_tokens=forbidden
        )
        assert not set(forbidden) & {token for row in found.tokens for token in row}


# callables


class Multiples:
    """Forbids the multiples of a number that grows with the length, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        step = 2 + input_ids.shape[1] % 3
        return scores.index_fill(1, torch.arange(0, scores.shape[1], step), float("-inf"))


@pytest.mark.parametrize(("width", "period"), SHAPES[:2])
def test_a_logits_processor_is_called_as_transformers_calls_it(
    subject: Tiny, width: int, period: int
) -> None:
    wanted = [
        transformers_tokens(
            subject,
            row,
            repetition_penalty=1.2,
            logits_processor=LogitsProcessorList([Multiples()]),
        )
        for row in RAGGED
    ]
    own = Multiples()
    found = subject.model.generate(
        RAGGED,
        mode="exact",
        tree_width=width,
        period=period,
        max_new_tokens=NEW,
        repetition_penalty=1.2,
        logits_processor=[own],
    )
    assert list(found.tokens) == wanted
    assert own.calls >= found.stats.periods


def test_a_processor_that_fails_leaves_the_model_as_it_was(subject: Tiny) -> None:
    before = subject.model.generate(RAGGED, mode="exact", max_new_tokens=4).tokens

    def fail(input_ids: Tensor, scores: Tensor) -> Tensor:
        raise ValueError("of the user's")

    with pytest.raises(ValueError, match="of the user's"):
        subject.model.generate(RAGGED, mode="exact", max_new_tokens=4, logits_processor=fail)
    with pytest.raises(GenerationError, match="must return scores"):
        subject.model.generate(RAGGED, logits_processor=lambda ids, scores: scores[:1, :1])
    assert subject.model.generate(RAGGED, mode="exact", max_new_tokens=4).tokens == before


# log-probabilities


def dense_log_p(
    tiny: Tiny, prompt: Sequence[int], tokens: Sequence[int], penalty: float = 1.0
) -> Tensor:
    """Log-probabilities [tokens, V] of the reference before each of `tokens`, by the definition."""
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        logits = tiny.reference(ids).logits[0, len(prompt) - 1 : -1].float()
    for place, row in enumerate(logits):
        seen = ids[0, : len(prompt) + place].unique()
        row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return logits.log_softmax(-1)


MODES: list[dict[str, Any]] = [
    {"mode": "sirius", "threshold": 0.3, "period": 5},
    {"mode": "sirius", "threshold": 0.0, "period": 4, "tree_width": 3},
    {"mode": "exact", "tree_width": 4, "period": 6},
    {"mode": "sample", "seed": 4, "temperature": 2.0, "top_k": 9},
    {"mode": "sample", "seed": 4, "temperature": 2.0, "tree_width": 3, "period": 4},
    {"mode": "full"},
    {"mode": "full", "seed": 2, "temperature": 3.0},
]


@pytest.mark.parametrize(
    ("options", "penalty"),
    slow_but(
        itertools.product(MODES, (1.0, 1.25)),
        [(mode, (1.0, 1.25)[i % 2]) for i, mode in enumerate(MODES)],
    ),
    ids=str,
)
def test_logprobs_are_those_of_a_dense_recomputation(
    subject: Tiny, options: dict[str, Any], penalty: float
) -> None:
    given = {"max_new_tokens": NEW, "eos_token_id": [], "repetition_penalty": penalty} | options
    found = subject.model.generate(RAGGED, logprobs=3, **given)
    assert found.tokens == subject.model.generate(RAGGED, **given).tokens
    assert found.logprobs is not None
    for prompt, tokens, told in zip(RAGGED, found.tokens, found.logprobs, strict=True):
        wanted = dense_log_p(subject, prompt, tokens, penalty)
        assert tuple(entry.token for entry in told) == tokens
        chosen = torch.tensor([entry.logprob for entry in told])
        assert torch.allclose(
            chosen, wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0], atol=1e-4
        )
        for entry, row in zip(told, wanted, strict=True):
            ids, values = zip(*entry.top, strict=True)
            best = row.topk(3)
            assert list(ids) == best.indices.tolist()
            assert torch.allclose(torch.tensor(values), best.values, atol=1e-4)


def test_logprobs_of_the_sparse_path_are_its_own(tiny: TinyModels) -> None:
    dense, sparse = tiny(method="none"), tiny(method="topk")
    given: dict[str, Any] = {"mode": "sparse", "logprobs": 1, "max_new_tokens": 6}
    told = dense.model.generate(RAGGED[0], **given)
    assert told.logprobs is not None
    wanted = dense_log_p(dense, RAGGED[0], told.tokens[0])
    assert [entry.logprob for entry in told.logprobs[0]] == pytest.approx(
        wanted.max(1).values.tolist(), abs=1e-4
    )
    own = sparse.model.generate(RAGGED[0], **given)
    assert own.logprobs is not None
    other = dense_log_p(sparse, RAGGED[0], own.tokens[0])
    assert [entry.logprob for entry in own.logprobs[0]] != pytest.approx(
        other.gather(1, torch.tensor(own.tokens[0])[:, None])[:, 0].tolist(), abs=1e-2
    )


def test_a_token_that_a_stop_cuts_off_has_no_logprob(subject: Tiny) -> None:
    given: dict[str, Any] = {"mode": "exact", "max_new_tokens": NEW, "period": 8}
    whole = subject.model.generate(RAGGED, **given, eos_token_id=[])
    word = f"w{whole.tokens[1][3]}"
    for stopped in (
        subject.model.generate(RAGGED, **given, eos_token_id=[], stop=word, logprobs=0),
        subject.model.generate(RAGGED, **given, eos_token_id=whole.tokens[1][3], logprobs=0),
    ):
        assert stopped.logprobs is not None
        assert len(stopped.tokens[1]) <= 4
        for tokens, told in zip(stopped.tokens, stopped.logprobs, strict=True):
            assert tuple(entry.token for entry in told) == tokens
            assert all(entry.top == () for entry in told)


def test_logprobs_follow_rows_that_outlive_others(subject: Tiny) -> None:
    """The batch shrinks under way; each row's are those of a run of its own."""
    ends = subject.model.generate(RAGGED, mode="exact", max_new_tokens=2).tokens
    given: dict[str, Any] = {
        "mode": "exact",
        "max_new_tokens": NEW,
        "eos_token_id": [ends[0][1], ends[1][1]],
        "repetition_penalty": 1.1,
        "logprobs": 2,
    }
    batch = subject.model.generate([*RAGGED, [60, 61]], **given)
    assert len({len(tokens) for tokens in batch.tokens}) > 1
    assert batch.logprobs is not None
    for place, prompt in enumerate([*RAGGED, [60, 61]]):
        alone = subject.model.generate(prompt, **given)
        assert alone.tokens[0] == batch.tokens[place]
        assert alone.logprobs is not None
        for one, other in zip(alone.logprobs[0], batch.logprobs[place], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("wrong", [-1, VOCABULARY + 1])
def test_logprobs_out_of_range_are_refused(subject: Tiny, wrong: int) -> None:
    with pytest.raises(ConfigError, match=rf"logprobs must be in 0..{VOCABULARY}"):
        subject.model.generate(RAGGED, logprobs=wrong)


def test_what_asks_for_nothing_tells_nothing_and_runs_as_before(subject: Tiny) -> None:
    from sirius_runtime.by_entries import ByEntries
    from sirius_runtime.decoder import Decoder, Way

    made = []
    open_ = Decoder.__init__

    def note(self: Decoder, *args: Any, **options: Any) -> None:
        open_(self, *args, **options)
        made.append(self.ways[Way.DRAFT])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "__init__", note)
        output = subject.model.generate(RAGGED, max_new_tokens=2, repetition_penalty=1.0)
    assert made == [ByEntries(scorer=None)]
    assert output.logprobs is None


# sampling


@pytest.mark.parametrize(
    "shape",
    [
        {"mode": "sample", "period": 4},
        pytest.param({"mode": "sample", "period": 4, "tree_width": 2}, marks=pytest.mark.slow),
        pytest.param({"mode": "full"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sampling_is_lossless_under_processors(tiny: TinyModels, shape: dict[str, Any]) -> None:
    """Tokens have the distribution of transformers' own logits after transformers' processor."""
    subject = tiny(method="topk", keep=0.1, vocab_size=sampling.VOCABULARY)
    paths = torch.tensor(
        list(itertools.product(range(sampling.VOCABULARY), repeat=sampling.COUNT - 1))
    )
    start = len(sampling.START)
    ids = torch.cat([torch.tensor(sampling.START).expand(len(paths), -1), paths], 1)
    with torch.no_grad():
        logits = subject.reference(ids).logits[:, start - 1 :]
    penalty = RepetitionPenaltyLogitsProcessor(2.5)
    processed = torch.stack(
        [penalty(ids[:, : start + t], logits[:, t]) for t in range(sampling.COUNT)], 1
    )
    whole = (sampling.VOCABULARY,) * (sampling.COUNT - 1)
    tokens = sampling.sampled(subject.model, repetition_penalty=2.5, **shape)
    wanted = sampling.joint(processed.unflatten(0, whole))
    assert sampling.least_p_value(tokens, wanted) > LEVEL
    plain = sampling.joint(logits.unflatten(0, whole))
    assert sampling.least_p_value(tokens, plain) < 1e-12


# other back ends


def penalising(graphs: str, folder: Path) -> Path:
    """Of a model whose generation config penalises repetition."""
    model = random_decoder("llama")
    model.generation_config = GenerationConfig(
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        eos_token_id=[2, 5],
        pad_token_id=0,
        bos_token_id=1,
    )
    config = CompileConfig(sparsity="griffin", period=4, graphs=graphs)
    compiled = compile_model(model, config, tokenizer=word_tokenizer())
    assert not compiled.warnings
    return compiled.save(folder / "m.sirius")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every kind of back end."""
    return penalising("both", tmp_path_factory.mktemp("artifact"))


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> SiriusModel:
    path = penalising("entries", tmp_path_factory.mktemp("entries"))
    return load(path, backend="eager", device="cpu")


OTHERS: list[dict[str, Any]] = [
    {"mode": "sirius"},
    {"mode": "exact", "logprobs": 2},
    {"mode": "sirius", "refresh": 2, "logprobs": 0, "confidence": 0.3},
    {"mode": "sample", "seed": 3},
    {"mode": "sample", "seed": 3, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.0},
    {"mode": "full", "logprobs": 1},
    {"mode": "sparse", "seed": 5, "typical_p": 0.9},
]


@pytest.mark.gate
@pytest.mark.parametrize("backend", ["period", "onnxruntime"])
def test_back_ends_of_whole_periods_step_through_them(
    artifact: Path, eager: SiriusModel, backend: str
) -> None:
    other = load_onnx(artifact) if backend == "onnxruntime" else load(artifact, backend=backend)
    for options in OTHERS:
        given = {"max_new_tokens": NEW, "period": 4, **options}
        wanted, found = eager.generate(RAGGED, **given), other.generate(RAGGED, **given)
        assert found.tokens == wanted.tokens, options
        for name in ("periods", "acceptance_rate", "advances"):
            assert getattr(found.stats, name) == getattr(wanted.stats, name), (options, name)
        assert found.stats.density == pytest.approx(wanted.stats.density)
        assert (found.logprobs is None) == (wanted.logprobs is None)
        for ours, theirs in zip(found.logprobs or (), wanted.logprobs or (), strict=True):
            assert [e.logprob for e in ours] == pytest.approx([e.logprob for e in theirs], abs=1e-4)
            assert [[i for i, _ in e.top] for e in ours] == [[i for i, _ in e.top] for e in theirs]


@pytest.mark.gate
def test_onnxruntime_refuses_a_tree_and_says_what_can(artifact: Path) -> None:
    model = load_onnx(artifact)
    with pytest.raises(ConfigError, match=r"repetition_penalty, .*tree_width is 2.*backend eager"):
        model.generate(RAGGED, tree_width=2)
    with pytest.raises(ConfigError, match="tree_width=1"):
        model.generate(RAGGED, period="auto", logprobs=1)


@pytest.mark.gate
def test_onnxruntime_without_pytorch_says_what_is_missing(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    model = load_onnx(artifact)
    monkeypatch.setitem(sys.modules, "sirius_runtime.backends.onnx_by_entries", None)
    with pytest.raises(BackendError, match=r"repetition_penalty, .* processes logits with PyTorch"):
        model.generate(RAGGED)
    off = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    assert model.generate(RAGGED, max_new_tokens=2, **off).tokens  # type: ignore[arg-type]


# the artifact's defaults


def test_a_generation_config_s_values_are_the_artifact_s_defaults(eager: SiriusModel) -> None:
    reference = random_decoder("llama")
    wanted = []
    for row in RAGGED:
        with torch.no_grad():
            output = reference.generate(
                torch.tensor([row]),
                attention_mask=torch.ones(1, len(row)),
                do_sample=False,
                max_new_tokens=NEW,
                repetition_penalty=1.2,
                no_repeat_ngram_size=3,
            )
        wanted.append(tuple(output[0, len(row) :].tolist()))
    assert list(eager.generate(RAGGED, mode="exact", max_new_tokens=NEW).tokens) == wanted
    off: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    assert list(eager.generate(RAGGED, mode="exact", max_new_tokens=NEW, **off).tokens) != wanted


def test_sampling_takes_the_artifact_s_values_unless_others_are_given(eager: SiriusModel) -> None:
    own = eager.generate(RAGGED, mode="sample", seed=3, max_new_tokens=NEW)
    given: dict[str, Any] = {"temperature": 0.5, "top_k": 7, "top_p": 0.9}
    same = eager.generate(RAGGED, mode="sample", seed=3, max_new_tokens=NEW, **given)
    assert own.tokens == same.tokens
    given |= {"temperature": 3.0, "top_k": 0, "top_p": 1.0}
    other = eager.generate(RAGGED, mode="sample", seed=3, max_new_tokens=NEW, **given)
    assert own.tokens != other.tokens
    greedy = eager.generate(RAGGED, mode="exact", max_new_tokens=NEW)
    assert greedy.seeds is None  # sampling values alone make no run a sampled one
