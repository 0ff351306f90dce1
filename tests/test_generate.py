"""`generate` at its boundaries: ends of rows, limits of length, streams, bad requests."""

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
from sirius_runtime import state as state_module
from sirius_runtime.by_entries import ByEntries, TreeState
from sirius_runtime.decoder import Decoder
from sirius_runtime.errors import GenerationError
from sirius_runtime.model import FinishReason, GenerationOutput, Mode, SiriusModel
from sirius_runtime.policy import Draft, Verdict
from tests.support.batch import Batch
from tests.support.fast import slow_but
from tests.support.models import (
    EOS,
    EVERY_METHOD,
    MAX_SEQ_LEN,
    VOCABULARY,
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


@pytest.fixture(scope="module", params=EVERY_METHOD)
def subject(request: pytest.FixtureRequest, tiny: TinyModels) -> Tiny:
    return tiny(method=request.param)


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> SiriusModel:
    return tiny(method="griffin").model


def endless(model: SiriusModel, prompt: Sequence[int], **options: Any) -> tuple[int, ...]:
    """The new tokens where no EOS ends them."""
    return model.generate(prompt, eos_token_id=[], **options).tokens[0]


def draws(mode: Mode) -> dict[str, Any]:
    """What makes a run of this mode the same again."""
    return {"seed": 3} if mode is Mode.SAMPLE else {}


class Periods:
    """Spies on the periods of one row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.advances: list[int] = []
        self.refused: set[int] = set()  # tokens of nodes off the kept paths
        commit = ByEntries.commit

        def spy(
            self_: ByEntries, state: TreeState, draft: Draft, *args: Any
        ) -> tuple[Tensor, Verdict]:
            logits, verdict = commit(self_, state, draft, *args)
            self.sizes.append(int(draft.depth[0]) + 1)
            self.advances.append(int(verdict.advance[0]))
            kept = {0, *verdict.nodes[0].tolist()}
            tokens = draft.tree.tokens[0].tolist()
            self.refused |= {token for node, token in enumerate(tokens) if node not in kept}
            return logits, verdict

        monkeypatch.setattr(ByEntries, "commit", spy)


# EOS


def test_every_eos_id_of_the_model_is_known(model: SiriusModel) -> None:
    assert model.program.eos_token_ids == EOS


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a run of 20 tokens."""
    mode = draw(st.sampled_from(list(Mode)))
    period, width = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    run = {"mode": mode, "period": period, "tree_width": width, "max_new_tokens": 20}
    return run | draws(mode)


@given(prompts, runs(), st.data())
def test_each_eos_id_ends_the_row(
    model: SiriusModel, prompt: list[int], options: dict[str, Any], data: st.DataObject
) -> None:
    tokens = endless(model, prompt, **options)
    eos = set(data.draw(st.lists(st.sampled_from(tokens), min_size=1, max_size=3)))
    first = min(index for index, token in enumerate(tokens) if token in eos)
    output = model.generate(prompt, eos_token_id=list(eos), **options)
    assert output.tokens[0] == tokens[: first + 1]
    assert output.finish_reasons == (FinishReason.EOS,)
    assert output.stats.tokens == first + 1


@pytest.mark.parametrize("eos", EOS)
def test_eos_ids_of_the_model_end_rows_unless_replaced(
    model: SiriusModel, monkeypatch: pytest.MonkeyPatch, eos: int
) -> None:
    run = Decoder.prefill

    def prefill(decoder: Decoder, *args: Any) -> list[int]:
        run(decoder, *args)
        return [eos]

    monkeypatch.setattr(Decoder, "prefill", prefill)
    assert model.generate(PROMPT, max_new_tokens=2, mode="full").tokens == ((eos,),)
    replaced = model.generate(PROMPT, max_new_tokens=2, mode="full", eos_token_id=[])
    assert len(replaced.tokens[0]) == 2


@pytest.mark.parametrize("width", [1, 3])
def test_drafted_eos_that_is_refused_ends_nothing(
    model: SiriusModel, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    periods = Periods(monkeypatch)
    options = {"mode": Mode.EXACT, "period": 6, "tree_width": width, "max_new_tokens": 40}
    tokens = endless(model, PROMPT, **options)
    eos = sorted(periods.refused - set(tokens))
    assert eos
    output = model.generate(PROMPT, eos_token_id=eos, **options)
    assert output.tokens[0] == tokens
    assert output.finish_reasons == (FinishReason.LENGTH,)


@pytest.mark.parametrize("width", [1, 3])
def test_eos_in_the_middle_of_a_period_drops_what_follows(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    model = tiny(method="topk").model
    options = {"threshold": 0.0, "period": 8, "tree_width": width, "max_new_tokens": 40}
    tokens = endless(model, PROMPT, **options)
    middle = next(
        index
        for index in range(9, 40)
        if (index - 1) % 8 in range(1, 6) and tokens[index] not in tokens[:index]
    )
    periods = Periods(monkeypatch)
    output = model.generate(PROMPT, eos_token_id=tokens[middle], **options)
    assert sum(periods.advances) > middle  # the period committed more than the row takes
    assert output.tokens[0] == tokens[: middle + 1]
    if width == 1:  # a chain is not drafted beyond its end: the root, and the levels up to it
        before, place = divmod(middle - 1, 8)
        assert periods.sizes == [8] * before + [1 + place + 1]


def test_eos_as_the_first_token_needs_no_period(model: SiriusModel) -> None:
    first = endless(model, PROMPT, max_new_tokens=1)[0]
    output = model.generate(PROMPT, eos_token_id=first, max_new_tokens=20)
    assert output.tokens == ((first,),)
    assert output.stats.periods == 0
    assert output.stats.aal is None


# stop strings


def text_after(model: SiriusModel, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """What tokens add to the text of their prompt."""
    assert model.tokenizer is not None
    text: str = model.tokenizer.decode([*prompt, *tokens])
    return text.removeprefix(model.tokenizer.decode(list(prompt)))


def first_stop(
    model: SiriusModel, prompt: Sequence[int], tokens: Sequence[int], stop: Sequence[str]
) -> int:
    """How many tokens it takes to complete one of the stop strings."""
    for count in range(1, len(tokens) + 1):
        if any(s in text_after(model, prompt, tokens[:count]) for s in stop):
            return count
    return len(tokens)


@given(prompts, runs(), st.data())
def test_stop_strings_wherever_they_lie(
    model: SiriusModel, prompt: list[int], run: dict[str, Any], data: st.DataObject
) -> None:
    options = {**run, "eos_token_id": []}
    plain = model.generate(prompt, **options)
    assert plain.texts is not None
    tokens, text = plain.tokens[0], plain.texts[0]
    stop = []
    for _ in range(data.draw(st.integers(1, 2))):
        start = data.draw(st.integers(0, len(text) - 1))
        stop.append(text[start : start + data.draw(st.integers(1, 12))])
    count = first_stop(model, prompt, tokens, stop)
    output = model.generate(prompt, stop=stop, **options)
    assert output.tokens[0] == tokens[:count]
    assert output.finish_reasons == (FinishReason.STOP,)
    shown = text_after(model, prompt, tokens[:count])
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
    assert output.texts == (" " + " ".join(words[:5])[:-1],)


def test_stop_string_in_the_prompt_stops_nothing(model: SiriusModel) -> None:
    tokens = endless(model, PROMPT, max_new_tokens=10)
    output = model.generate("w7 w8 w9", stop="w7 w8", max_new_tokens=10, eos_token_id=[])
    assert output.prompts == (tuple(PROMPT),)
    assert output.tokens[0] == tokens


# prompts longer than a chunk


@pytest.mark.parametrize("chunk", slow_but((1, 4, 5), {4}))
def test_chunks_of_a_prompt_change_nothing(
    subject: Tiny, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    batch = [
        torch.randint(6, VOCABULARY, (size,), generator=generator).tolist()
        for size in (3, 4, 5, 8, 9, 17)
    ]

    def run() -> tuple[GenerationOutput, Batch]:
        session = open_session(subject.model, len(batch))
        session.prefill(batch)
        return subject.model.generate(batch, max_new_tokens=12), session

    whole, session = run()
    monkeypatch.setattr(state_module, "PREFILL_CHUNK", chunk)
    chunked, chunked_session = run()
    assert chunked.tokens == whole.tokens
    assert torch.equal(chunked_session.state.root, session.state.root)
    assert torch.equal(chunked_session.state.length, session.state.length)
    if "neurons" in state_of(session):
        assert torch.equal(state_of(chunked_session)["neurons"], state_of(session)["neurons"])
    passes = math.ceil(17 / chunk)
    weight_bytes = whole.stats.weight_bytes
    assert chunked.stats.bytes_read["rest"] == passes * weight_bytes


# lengths


@given(
    prompts,
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 25),
    st.sampled_from([0.0, 0.1, 2.0]),
)
def test_max_new_tokens_is_met_exactly(
    model: SiriusModel,
    prompt: list[int],
    period: int,
    width: int,
    new_tokens: int,
    threshold: float,
) -> None:
    output = model.generate(
        prompt,
        period=period,
        tree_width=width,
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
    assert periods.sizes == [8, 8, 3]


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


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.SAMPLE])
def test_one_new_token_is_the_dense_one(subject: Tiny, mode: Mode) -> None:
    output = subject.model.generate(PROMPT, mode=mode, max_new_tokens=1)
    assert output.tokens[0] == subject.greedy(PROMPT, 1)
    assert output.stats.periods == 0


def test_sparse_mode_is_never_corrected(model: SiriusModel) -> None:
    sparse = endless(model, PROMPT, mode=Mode.SPARSE, max_new_tokens=21)
    # Threshold 0 keeps every draft; the 20th drafted token would be the bonus.
    assert sparse[:20] == endless(model, PROMPT, threshold=0.0, period=20, max_new_tokens=21)[:20]
    assert sparse != endless(model, PROMPT, mode=Mode.FULL, max_new_tokens=21)


# forms of a request


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
    # It decodes the answer alone, without the space after the prompt.
    assert output.texts == (" " + written.getvalue().removesuffix("\n"),)
    assert len(output.tokens[0]) == 12


def test_streamer_with_a_batch_is_refused(model: SiriusModel) -> None:
    streamer = TextStreamer(word_tokenizer())
    with pytest.raises(GenerationError, match="one row, the batch has 3"):
        model.generate(RAGGED, streamer=streamer)


# tokenizers


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
