"""The laws of Sirius that concern tokens, over random requests, for chains and for trees.

1 thresholds 0 and above 1, 2 exact mode is dense greedy, 3 the tokens are the naive decoder's, 6
nothing shown is taken back. The others are in `test_laws_state`.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sirius_runtime.model import Mode
from sirius_runtime.plan import Plan
from sirius_runtime.text import TextStream
from tests.support.fast import gate_but
from tests.support.models import (
    EVERY_METHOD,
    VOCABULARY,
    Rows,
    Tiny,
    TinyModels,
    open_session,
    random_decoder,
)
from tests.support.naive_decoder import Sparsity, naive_sirius, naive_sirius_tree

ABOVE_ONE = 1.01

token_ids = st.integers(6, VOCABULARY - 1)
prompts = st.lists(token_ids, min_size=1, max_size=20)
batches = st.lists(prompts, min_size=1, max_size=3)
periods = st.integers(1, 9)
widths = st.integers(1, 8)
thresholds = st.sampled_from([0.0, 0.02, 0.1, 0.3, 1.0, ABOVE_ONE])
confidences = st.sampled_from([0.0, 0.2, 0.8])
lengths = st.integers(1, 20)


@pytest.fixture(scope="module", params=EVERY_METHOD)
def subject(request: pytest.FixtureRequest, tiny: TinyModels) -> Tiny:
    return tiny(method=request.param)


# 1: thresholds


@given(batches, periods, widths, st.floats(0.1, 3.0))
def test_threshold_zero_accepts_a_whole_deepest_path(
    subject: Tiny, batch: Rows, size: int, width: int, temperature: float
) -> None:
    session = open_session(subject.model, len(batch))
    session.prefill(batch)
    plan = Plan(size, width, threshold=0.0, verify_temperature=temperature)
    most = torch.full((len(batch),), size)
    deepest = (size - 2) * width + 1 if size > 1 else 0  # the likeliest node of the last level
    for _ in range(2):
        draft = session.draft(plan, most)
        verdict = session.commit(draft, session.verify(draft), plan, most)
        assert verdict.advance.tolist() == [size] * len(batch)
        path = verdict.nodes
        assert path[:, -1].tolist() == [deepest] * len(batch)
        assert torch.equal(draft.tree.parents.gather(1, path[:, 1:]), path[:, :-1])
        assert torch.equal(verdict.tokens[:, :-1], draft.tree.tokens.gather(1, path[:, 1:]))


@given(batches, periods, widths, lengths)
def test_threshold_above_one_is_dense_greedy_a_token_a_period(
    subject: Tiny, batch: Rows, period: int, width: int, new_tokens: int
) -> None:
    output = subject.model.generate(
        batch, threshold=ABOVE_ONE, period=period, tree_width=width, max_new_tokens=new_tokens
    )
    assert output.tokens == tuple(subject.greedy(prompt, new_tokens) for prompt in batch)
    assert output.stats.advances.keys() <= {1}


# 2: exact mode


@given(batches, periods, widths, lengths, confidences)
def test_exact_mode_is_transformers_greedy(
    subject: Tiny, batch: Rows, period: int, width: int, new_tokens: int, confidence: float
) -> None:
    output = subject.model.generate(
        batch,
        mode=Mode.EXACT,
        period=period,
        tree_width=width,
        confidence=confidence,
        max_new_tokens=new_tokens,
    )
    assert output.tokens == tuple(subject.greedy(prompt, new_tokens) for prompt in batch)


@given(batches, periods, widths, lengths, st.integers(1, 3))
def test_exact_mode_is_transformers_greedy_whatever_neurons_are_chosen_anew(
    tiny: TinyModels, batch: Rows, period: int, width: int, new_tokens: int, refresh: int
) -> None:
    subject = tiny(method="griffin")
    output = subject.model.generate(
        batch,
        mode=Mode.EXACT,
        period=period,
        tree_width=width,
        refresh=refresh,
        max_new_tokens=new_tokens,
    )
    assert output.tokens == tuple(subject.greedy(prompt, new_tokens) for prompt in batch)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("method", ["griffin", "topk", "cats"])
def test_exact_mode_refuses_some_drafts_and_accepts_others(
    tiny: TinyModels, method: str, width: int
) -> None:
    """What the law above is worth: the sparse path is neither always right nor always wrong."""
    batch = [[7, 8, 9], [50, 30, 11, 22, 60]]
    output = tiny(method=method).model.generate(
        batch, mode=Mode.EXACT, period=8, tree_width=width, max_new_tokens=40, eos_token_id=[]
    )
    assert output.stats.corrections > 3
    assert max(output.stats.advances) > 3


def test_a_tree_accepts_what_a_chain_does_not(tiny: TinyModels) -> None:
    """What trees are worth: more tokens a period, and still the dense ones."""
    model = tiny(method="griffin").model
    chain, tree = (
        model.generate(
            [[7, 8, 9], [50, 30, 11]],
            mode=Mode.EXACT,
            period=8,
            tree_width=width,
            max_new_tokens=60,
            eos_token_id=[],
        )
        for width in (1, 8)
    )
    assert tree.tokens == chain.tokens
    assert tree.stats.periods < chain.stats.periods


# 3: the naive decoder, on transformers' own model and cache


class Naive:
    """The same model anew, its MLPs patched."""

    def __init__(self, subject: Tiny) -> None:
        spec = subject.model.program.sparsity
        self.model = random_decoder("llama")
        self.sparsity = Sparsity(spec.method, spec.sites)
        self.sparsity.patch(self.model)


NAIVE: dict[str, Naive] = {}


def naive(tiny: TinyModels, method: str) -> tuple[Tiny, Naive]:
    """Made once for each method."""
    subject = tiny(method=method)
    if method not in NAIVE:
        NAIVE[method] = Naive(subject)
    return subject, NAIVE[method]


@pytest.mark.parametrize("method", gate_but(("griffin", "topk", "cats"), {"griffin", "topk"}))
@given(prompts, periods, thresholds, st.floats(0.3, 3.0), lengths)
def test_a_tree_of_width_one_is_the_naive_decoder_s_chain(
    tiny: TinyModels,
    method: str,
    prompt: list[int],
    period: int,
    threshold: float,
    temperature: float,
    new_tokens: int,
) -> None:
    subject, other = naive(tiny, method)
    output = subject.model.generate(
        prompt,
        period=period,
        tree_width=1,
        threshold=threshold,
        verify_temperature=temperature,
        max_new_tokens=new_tokens,
    )
    expected = naive_sirius(
        other.model,
        other.sparsity,
        prompt,
        period=period,
        threshold=threshold,
        temperature=temperature,
        max_new_tokens=new_tokens,
        eos=set(subject.model.program.eos_token_ids),
    )
    assert list(output.tokens[0]) == expected.tokens
    assert output.stats.advances == Counter(expected.advances)


@given(prompts, st.integers(2, 6), st.integers(2, 8), thresholds, st.floats(0.3, 3.0), lengths)
def test_a_tree_is_the_naive_decoder_s_whose_paths_are_run_alone(
    tiny: TinyModels,
    prompt: list[int],
    period: int,
    width: int,
    threshold: float,
    temperature: float,
    new_tokens: int,
) -> None:
    subject, other = naive(tiny, "griffin")
    output = subject.model.generate(
        prompt,
        period=period,
        tree_width=width,
        threshold=threshold,
        verify_temperature=temperature,
        max_new_tokens=new_tokens,
    )
    expected = naive_sirius_tree(
        other.model,
        other.sparsity,
        prompt,
        period=period,
        width=width,
        threshold=threshold,
        temperature=temperature,
        max_new_tokens=new_tokens,
        eos=set(subject.model.program.eos_token_ids),
    )
    assert list(output.tokens[0]) == expected.tokens
    assert output.stats.advances == Counter(expected.advances)


# 6: streaming


class Recorder:
    """A streamer that keeps what it was given, call by call; the first is the prompt."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.calls.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@given(prompts, periods, widths, thresholds, lengths, st.sampled_from(list(Mode)), confidences)
def test_streamed_tokens_are_a_prefix_of_the_final_ones(
    subject: Tiny,
    prompt: list[int],
    period: int,
    width: int,
    threshold: float,
    new_tokens: int,
    mode: Mode,
    confidence: float,
) -> None:
    recorder = Recorder()
    output = subject.model.generate(
        prompt,
        mode=mode,
        period=period,
        tree_width=width,
        threshold=threshold,
        confidence=confidence,
        max_new_tokens=new_tokens,
        seed=3 if mode is Mode.SAMPLE else None,
        streamer=recorder,
    )
    assert recorder.ended
    shown, *puts = recorder.calls
    assert shown == prompt
    streamed: list[int] = []
    for tokens in puts:
        assert tokens
        streamed += tokens
        assert tuple(streamed) == output.tokens[0][: len(streamed)]
    assert tuple(streamed) == output.tokens[0]


@given(prompts, periods, widths, thresholds, lengths, st.data())
def test_streamed_text_is_the_final_text(
    subject: Tiny,
    prompt: list[int],
    period: int,
    width: int,
    threshold: float,
    new_tokens: int,
    data: st.DataObject,
) -> None:
    model = subject.model

    def run(stop: tuple[str, ...], write: list[str]) -> str:
        assert model.tokenizer is not None
        output = model.generate(
            prompt,
            period=period,
            tree_width=width,
            threshold=threshold,
            max_new_tokens=new_tokens,
            stop=stop,
            streamer=TextStream(model.tokenizer, write.append, stop),
        )
        assert output.texts is not None
        return output.texts[0]

    plain: list[str] = []
    text = run((), plain)
    assert "".join(plain) == text
    if text:
        start = data.draw(st.integers(0, len(text) - 1))
        stop = text[start : data.draw(st.integers(start + 1, min(len(text), start + 9)))]
        stopped: list[str] = []
        assert run((stop,), stopped) == "".join(stopped) == text[: text.index(stop)]
