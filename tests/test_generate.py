"""`generate` at its boundaries: ends of rows, limits of length, batches, streams, bad requests."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import TextStreamer

import sirius_runtime
from sirius_runtime import session as session_module
from sirius_runtime.errors import GenerationError, UserError
from sirius_runtime.model import FinishReason, GenerationOutput, Mode, SiriusModel
from sirius_runtime.policy import Verdict
from sirius_runtime.session import Session
from tests.support.models import (
    EOS,
    MAX_SEQ_LEN,
    METHODS,
    VOCABULARY,
    Rows,
    Tiny,
    TinyModels,
    open_session,
    state_of,
    word_tokenizer,
)

PROMPT = [7, 8, 9]
RAGGED = [[7, 8, 9], [50, 30, 11, 22, 60, 71], [33]]

token_ids = st.integers(6, VOCABULARY - 1)
prompts = st.lists(token_ids, min_size=1, max_size=20)


@pytest.fixture(scope="module", params=METHODS)
def subject(request: pytest.FixtureRequest, tiny: TinyModels) -> Tiny:
    return tiny(method=request.param)


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> SiriusModel:
    return tiny(method="griffin").model


def endless(model: SiriusModel, prompt: Sequence[int], **options: Any) -> tuple[int, ...]:
    """The new tokens where no EOS ends them."""
    return model.generate(prompt, eos_token_id=[], **options).tokens[0]


class Periods:
    """Spies on the periods of a Session: chunks [K] and verdicts of one row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, row: int = 0) -> None:
        self.chunks: list[list[int]] = []
        self.advances: list[int] = []
        commit = Session.commit

        def spy(session: Session, chunk_BK: Tensor, *args: Any) -> Verdict:
            verdict = commit(session, chunk_BK, *args)
            self.chunks.append(chunk_BK[row].tolist())
            self.advances.append(int(verdict.advance[row]))
            return verdict

        monkeypatch.setattr(Session, "commit", spy)


# EOS


def test_every_eos_id_of_the_model_is_known(model: SiriusModel) -> None:
    assert model.program.eos_token_ids == EOS


@given(prompts, st.sampled_from(list(Mode)), st.integers(1, 9), st.data())
def test_each_eos_id_ends_the_row(
    model: SiriusModel, prompt: list[int], mode: Mode, period: int, data: st.DataObject
) -> None:
    tokens = endless(model, prompt, mode=mode, period=period, max_new_tokens=20)
    eos = set(data.draw(st.lists(st.sampled_from(tokens), min_size=1, max_size=3)))
    first = min(index for index, token in enumerate(tokens) if token in eos)
    options = {"mode": mode, "period": period, "max_new_tokens": 20, "eos_token_id": list(eos)}
    output = model.generate(prompt, **options)
    assert output.tokens[0] == tokens[: first + 1]
    assert output.finish_reasons == (FinishReason.EOS,)
    assert output.stats.tokens == first + 1


@pytest.mark.parametrize("eos", EOS)
def test_eos_ids_of_the_model_end_rows_unless_replaced(
    model: SiriusModel, monkeypatch: pytest.MonkeyPatch, eos: int
) -> None:
    def prefill(session: Session, prompts: Rows) -> Tensor:
        return torch.tensor([eos])

    monkeypatch.setattr(Session, "prefill", prefill)
    assert model.generate(PROMPT, max_new_tokens=2, mode="full").tokens == ((eos,),)
    replaced = model.generate(PROMPT, max_new_tokens=2, mode="full", eos_token_id=[])
    assert len(replaced.tokens[0]) == 2


def test_drafted_eos_that_is_refused_ends_nothing(
    model: SiriusModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    periods = Periods(monkeypatch)
    options = {"mode": Mode.EXACT, "period": 6, "max_new_tokens": 40}
    tokens = endless(model, PROMPT, **options)
    refused = {
        token
        for chunk, advance in zip(periods.chunks, periods.advances, strict=True)
        for token in chunk[advance:]
    }
    eos = sorted(refused - set(tokens))
    assert eos
    output = model.generate(PROMPT, eos_token_id=eos, **options)
    assert output.tokens[0] == tokens
    assert output.finish_reasons == (FinishReason.LENGTH,)


def test_eos_in_the_middle_of_a_period_drops_what_follows(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(method="topk").model
    options = {"threshold": 0.0, "period": 8, "max_new_tokens": 40}
    tokens = endless(model, PROMPT, **options)
    middle = next(
        index
        for index in range(1, 40)
        if (index - 1) % 8 in range(1, 6) and tokens[index] not in tokens[:index]
    )
    periods = Periods(monkeypatch)
    output = model.generate(PROMPT, eos_token_id=tokens[middle], **options)
    assert sum(periods.advances) > middle  # the period committed more than the row takes
    assert output.tokens[0] == tokens[: middle + 1]


def test_eos_as_the_first_token_needs_no_period(model: SiriusModel) -> None:
    first = endless(model, PROMPT, max_new_tokens=1)[0]
    output = model.generate(PROMPT, eos_token_id=first, max_new_tokens=20)
    assert output.tokens == ((first,),)
    assert output.stats.periods == 0
    assert output.stats.aal is None


# stop strings


def first_stop(model: SiriusModel, tokens: Sequence[int], stop: Sequence[str]) -> int:
    """How many tokens it takes to complete one of the stop strings."""
    assert model.tokenizer is not None
    for count in range(1, len(tokens) + 1):
        if any(s in model.tokenizer.decode(tokens[:count]) for s in stop):
            return count
    return len(tokens)


@given(prompts, st.sampled_from(list(Mode)), st.integers(1, 9), st.data())
def test_stop_strings_wherever_they_lie(
    model: SiriusModel, prompt: list[int], mode: Mode, period: int, data: st.DataObject
) -> None:
    options = {"mode": mode, "period": period, "max_new_tokens": 20, "eos_token_id": []}
    plain = model.generate(prompt, **options)
    assert plain.texts is not None
    tokens, text = plain.tokens[0], plain.texts[0]
    stop = []
    for _ in range(data.draw(st.integers(1, 2))):
        start = data.draw(st.integers(0, len(text) - 1))
        stop.append(text[start : start + data.draw(st.integers(1, 12))])
    count = first_stop(model, tokens, stop)
    output = model.generate(prompt, stop=stop, **options)
    assert output.tokens[0] == tokens[:count]
    assert output.finish_reasons == (FinishReason.STOP,)
    shown = model.tokenizer.decode(tokens[:count])  # type: ignore[union-attr]
    assert output.texts == (shown[: min(shown.index(s) for s in stop if s in shown)],)


def test_stop_string_across_tokens_and_periods(tiny: TinyModels) -> None:
    model = tiny(method="topk").model
    options = {"threshold": 0.0, "period": 4, "max_new_tokens": 20}
    tokens = endless(model, PROMPT, **options)
    # Periods of 4 after the first token: tokens 4 and 5 are of different ones.
    words = [f"w{token}" for token in tokens]
    stop = f"{words[4][-1]} {words[5]}"
    text = " ".join(words)
    assert text.index(stop) == len(" ".join(words[:5])) - 1
    output = model.generate(PROMPT, stop=stop, **options)
    assert output.tokens[0] == tokens[:6]
    assert output.texts == (" ".join(words[:5])[:-1],)


def test_stop_string_in_the_prompt_stops_nothing(model: SiriusModel) -> None:
    tokens = endless(model, PROMPT, max_new_tokens=10)
    output = model.generate("w7 w8 w9", stop="w7 w8", max_new_tokens=10, eos_token_id=[])
    assert output.prompts == (tuple(PROMPT),)
    assert output.tokens[0] == tokens


# prompts longer than a chunk


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_chunks_of_a_prompt_change_nothing(
    subject: Tiny, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    batch = [
        torch.randint(6, VOCABULARY, (size,), generator=generator).tolist()
        for size in (3, 4, 5, 8, 9, 17)
    ]

    def run() -> tuple[GenerationOutput, Session]:
        session = open_session(subject.model, len(batch))
        session.prefill(batch)
        return subject.model.generate(batch, max_new_tokens=12), session

    whole, session = run()
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", chunk)
    chunked, chunked_session = run()
    assert chunked.tokens == whole.tokens
    assert torch.equal(chunked_session.root, session.root)
    assert torch.equal(chunked_session.length, session.length)
    if "neurons" in state_of(session):
        assert torch.equal(state_of(chunked_session)["neurons"], state_of(session)["neurons"])
    passes = math.ceil(17 / chunk)
    weight_bytes = whole.stats.weight_bytes
    assert chunked.stats.bytes_read["rest"] == passes * weight_bytes


# lengths


@given(prompts, st.integers(1, 9), st.integers(1, 25), st.sampled_from([0.0, 0.1, 2.0]))
def test_max_new_tokens_is_met_exactly(
    model: SiriusModel, prompt: list[int], period: int, new_tokens: int, threshold: float
) -> None:
    output = model.generate(
        prompt,
        period=period,
        max_new_tokens=new_tokens,
        threshold=threshold,
        eos_token_id=[],
    )
    assert len(output.tokens[0]) == new_tokens
    assert output.finish_reasons == (FinishReason.LENGTH,)


def test_last_period_is_cut_to_what_is_wanted(
    model: SiriusModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    periods = Periods(monkeypatch)
    endless(model, PROMPT, threshold=0.0, period=8, max_new_tokens=20)
    assert list(map(len, periods.chunks)) == [8, 8, 3]


@pytest.mark.parametrize("mode", [Mode.EXACT, Mode.FULL])
@pytest.mark.parametrize("left", [1, 2, 5, 9])
def test_sequences_reach_max_seq_len(tiny: TinyModels, left: int, mode: Mode) -> None:
    subject = tiny(method="topk")
    prompt = torch.randint(6, VOCABULARY, (MAX_SEQ_LEN - left,)).tolist()
    output = subject.model.generate(prompt, mode=mode, max_new_tokens=left)
    assert output.tokens[0] == subject.greedy(prompt, left)


def test_default_of_new_tokens_is_what_is_left(model: SiriusModel) -> None:
    assert len(endless(model, [7] * (MAX_SEQ_LEN - 10))) == 10


@pytest.mark.parametrize(
    ("prompt_length", "new_tokens", "match"),
    [
        (MAX_SEQ_LEN - 5, 6, r"max_new_tokens must be in 1\.\.5 .*128"),
        (MAX_SEQ_LEN - 5, 0, r"max_new_tokens must be in 1\.\.5 .*128"),
        (MAX_SEQ_LEN, None, r"prompt has 128 tokens.* sequences of 128.*--max-seq-len"),
        (MAX_SEQ_LEN + 9, 1, r"prompt has 137 tokens.* sequences of 128.*--max-seq-len"),
    ],
)
def test_too_long_is_refused_and_the_next_call_works(
    model: SiriusModel, prompt_length: int, new_tokens: int | None, match: str
) -> None:
    before = endless(model, PROMPT, max_new_tokens=10)
    with pytest.raises(GenerationError, match=match):
        model.generate([7] * prompt_length, max_new_tokens=new_tokens)
    assert endless(model, PROMPT, max_new_tokens=10) == before


@pytest.mark.parametrize("threshold", [0.0, 0.1, 2.0])
def test_period_of_one_is_dense_greedy(subject: Tiny, threshold: float) -> None:
    output = subject.model.generate(PROMPT, period=1, threshold=threshold, max_new_tokens=15)
    assert output.tokens[0] == subject.greedy(PROMPT, 15)
    assert output.stats.acceptance_rate is None


@pytest.mark.parametrize("mode", list(Mode))
def test_one_new_token_is_the_dense_one(subject: Tiny, mode: Mode) -> None:
    output = subject.model.generate(PROMPT, mode=mode, max_new_tokens=1)
    assert output.tokens[0] == subject.greedy(PROMPT, 1)
    assert output.stats.periods == 0


def test_sparse_mode_is_never_corrected(model: SiriusModel) -> None:
    sparse = endless(model, PROMPT, mode=Mode.SPARSE, max_new_tokens=21)
    # Threshold 0 keeps every draft; the 20th drafted token would be the bonus.
    assert sparse[:20] == endless(model, PROMPT, threshold=0.0, period=20, max_new_tokens=21)[:20]
    assert sparse != endless(model, PROMPT, mode=Mode.FULL, max_new_tokens=21)


# batches


@given(
    st.lists(prompts, min_size=2, max_size=4),
    st.sampled_from(list(Mode)),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.integers(1, 20),
)
def test_rows_of_a_batch_are_their_own_runs(
    subject: Tiny, batch: Rows, mode: Mode, period: int, threshold: float, new_tokens: int
) -> None:
    options: dict[str, Any] = {
        "mode": mode,
        "period": period,
        "threshold": threshold,
        "max_new_tokens": new_tokens,
    }
    single = [subject.model.generate(prompt, **options) for prompt in batch]
    output = subject.model.generate(batch, **options)
    assert output.tokens == tuple(run.tokens[0] for run in single)
    assert output.finish_reasons == tuple(run.finish_reasons[0] for run in single)
    assert output.texts == tuple(run.texts[0] for run in single if run.texts)
    assert output.stats.tokens == sum(run.stats.tokens for run in single)
    assert output.stats.periods == sum(run.stats.periods for run in single)
    assert output.stats.corrections == sum(run.stats.corrections for run in single)


@pytest.mark.parametrize("mode", list(Mode))
def test_rows_near_the_length_limit_are_their_own_runs(subject: Tiny, mode: Mode) -> None:
    generator = torch.Generator().manual_seed(2)
    batch = [
        torch.randint(6, VOCABULARY, (size,), generator=generator).tolist()
        for size in (MAX_SEQ_LEN - 20, MAX_SEQ_LEN - 33, 2)
    ]
    options: dict[str, Any] = {"mode": mode, "period": 8, "max_new_tokens": 20}
    expected = tuple(endless(subject.model, prompt, **options) for prompt in batch)
    assert subject.model.generate(batch, eos_token_id=[], **options).tokens == expected


def test_row_that_ended_stays_as_it_is(model: SiriusModel) -> None:
    options: dict[str, Any] = {"period": 4, "max_new_tokens": 24}
    alone = [endless(model, prompt, **options) for prompt in RAGGED]
    eos = next(token for token in alone[0][2:] if token not in {*alone[1], *alone[2]})
    output = model.generate(RAGGED, eos_token_id=eos, **options)
    assert output.tokens == (alone[0][: alone[0].index(eos) + 1], alone[1], alone[2])
    assert output.finish_reasons == (FinishReason.EOS, FinishReason.LENGTH, FinishReason.LENGTH)


def padded(rows: Rows, side: str) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, padded by token 0."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, where] = torch.tensor(row)
        mask[index, where] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_tensors(model: SiriusModel, side: str) -> None:
    ids, mask = padded(RAGGED, side)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=10)
    assert output.prompts == tuple(map(tuple, RAGGED))
    assert output.tokens == model.generate(RAGGED, max_new_tokens=10).tokens


def test_forms_of_one_prompt(model: SiriusModel) -> None:
    expected = model.generate([PROMPT], max_new_tokens=10)
    forms = (PROMPT, tuple(PROMPT), torch.tensor(PROMPT), torch.tensor([PROMPT]), "w7 w8 w9")
    for inputs in (*forms, ["w7 w8 w9"]):
        output = model.generate(inputs, max_new_tokens=10)
        assert (output.prompts, output.tokens) == (expected.prompts, expected.tokens)


def test_texts_and_ids_in_one_batch(model: SiriusModel) -> None:
    output = model.generate(["w7 w8 w9", RAGGED[1]], max_new_tokens=10)
    assert output.tokens == model.generate(RAGGED[:2], max_new_tokens=10).tokens


# streamers


def test_streamer_of_transformers(model: SiriusModel) -> None:
    written = io.StringIO()
    with redirect_stdout(written):
        streamer = TextStreamer(word_tokenizer(), skip_prompt=True)
        output = model.generate(PROMPT, max_new_tokens=12, eos_token_id=[], streamer=streamer)
    assert output.texts == (written.getvalue().removesuffix("\n"),)
    assert len(output.tokens[0]) == 12


def test_streamer_with_a_batch_is_refused(model: SiriusModel) -> None:
    streamer = TextStreamer(word_tokenizer())
    with pytest.raises(GenerationError, match="one row, the batch has 3"):
        model.generate(RAGGED, streamer=streamer)


# bad requests


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "dense"}, "mode must be one of sirius, exact, full, sparse, got 'dense'"),
        ({"period": 0}, r"period must be in 1\.\.512, got 0"),
        ({"period": 513}, r"period must be in 1\.\.512, got 513"),
        ({"threshold": -0.5}, r"threshold must be >= 0, got -0\.5"),
        ({"threshold": math.nan}, "threshold must be >= 0, got nan"),
        ({"verify_temperature": 0.0}, "verify_temperature must be > 0, got 0"),
        ({"verify_temperature": math.inf}, "verify_temperature must be > 0, got inf"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be in 1\.\.125 "),
        ({"max_new_tokens": -1}, r"max_new_tokens must be in 1\.\.125 "),
        ({"stop": ""}, "stop string is empty"),
        ({"stop": ["a", ""]}, "stop string is empty"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask goes with a tensor"),
    ],
)
def test_bad_options_are_refused(model: SiriusModel, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        model.generate(PROMPT, **options)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ([], "no prompt was given"),
        ([[]], "prompt 0 is empty"),
        (["w7", ""], "prompt 1 is empty"),
        (torch.zeros(0, 3, dtype=torch.int64), "no prompt was given"),
        (torch.zeros(1, 0, dtype=torch.int64), "prompt 0 is empty"),
        ([7, VOCABULARY], r"prompt 0 has a token id outside of the vocabulary \(0\.\.100\)"),
        ([[7], [7, -1]], r"prompt 1 has a token id outside of the vocabulary \(0\.\.100\)"),
        (torch.tensor([[7.0, 8.0]]), "input_ids must be integers"),
        (
            torch.zeros(1, 1, 3, dtype=torch.int64),
            r"shape \[B, T\] or \[T\], got torch\.int64 \[1, 1, 3\]",
        ),
    ],
)
def test_bad_prompts_are_refused(model: SiriusModel, inputs: Any, match: str) -> None:
    with pytest.raises(GenerationError, match=match):
        model.generate(inputs, max_new_tokens=2)


@pytest.mark.parametrize("shape", [(3, 2), (2, 4), (6,)])
def test_mask_of_another_shape_is_refused(model: SiriusModel, shape: tuple[int, ...]) -> None:
    ids = torch.full((2, 3), 7)
    with pytest.raises(GenerationError, match="attention_mask"):
        model.generate(ids, attention_mask=torch.ones(shape), max_new_tokens=2)


def test_row_that_is_all_padding_is_refused(model: SiriusModel) -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(GenerationError, match="prompt 1 is empty"):
        model.generate(torch.full((2, 2), 7), attention_mask=mask)


def test_model_without_a_tokenizer_takes_ids_only(model: SiriusModel) -> None:
    bare = SiriusModel(model.backend, None)
    output = bare.generate(PROMPT, max_new_tokens=5)
    assert output.texts is None
    assert output.tokens == model.generate(PROMPT, max_new_tokens=5).tokens
    with pytest.raises(GenerationError, match="no tokenizer: give token ids"):
        bare.generate("w7")
    with pytest.raises(GenerationError, match="stop strings need a tokenizer"):
        bare.generate(PROMPT, stop="w7")


def test_padding_and_truncation_of_the_tokenizer_do_not_touch_prompts(
    tiny: TinyModels, tmp_path: Path
) -> None:
    """A tokenizer.json carries the settings of whoever saved it last."""
    tokenizer = word_tokenizer().backend_tokenizer
    tokenizer.enable_padding(length=8, pad_token="<pad>")
    tokenizer.enable_truncation(4)
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    compiled = replace(tiny(method="topk").compiled, tokenizer_files=files)
    loaded = sirius_runtime.load(compiled.save(tmp_path / "model.sirius"))
    for model in (loaded, compiled.to_runtime()):
        assert model.generate("w7 w8 w9", max_new_tokens=1).prompts == ((7, 8, 9),)
        assert model.generate("w6 " * 6, max_new_tokens=1).prompts == ((6,) * 6,)
