"""What `generate` refuses, in which words, and that a refused call leaves no trace; what it allows
at the limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sirius_runtime.errors import ConfigError, GenerationError, UserError
from sirius_runtime.model import GenerationOutput, Mode, SiriusModel
from sirius_runtime.plan import Limits
from sirius_runtime.request import Options, Request, check_ranges, check_tree, read_options
from tests.support.fast import gate_but
from tests.support.models import EVERY_METHOD, MAX_SEQ_LEN, VOCABULARY, Tiny, TinyModels

PROMPT = [7, 8, 9]
ROOM = MAX_SEQ_LEN - len(PROMPT)
GREEDY = "is greedy; use mode sample (or full, or sparse)"

token_ids = st.integers(6, VOCABULARY - 1)
prompts = st.lists(token_ids, min_size=1, max_size=20)


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> SiriusModel:
    return tiny(method="griffin").model


# options

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mode": "dense"}, "mode must be one of sirius, exact, sample, full, sparse, got 'dense'"),
    ({"mode": ""}, "mode must be one of sirius, exact, sample, full, sparse, got ''"),
    # the tree
    ({"period": 0}, "period must be in 1..512, got 0"),
    ({"period": -1}, "period must be in 1..512, got -1"),
    ({"period": 513}, "period must be in 1..512, got 513"),
    ({"period": "8"}, "period must be a number or 'auto', got '8'"),
    ({"period": "Auto"}, "period must be a number or 'auto', got 'Auto'"),
    ({"period": ""}, "period must be a number or 'auto', got ''"),
    ({"tree_width": 0}, "tree_width must be in 1..101 (the vocabulary), got 0"),
    ({"tree_width": -2}, "tree_width must be in 1..101 (the vocabulary), got -2"),
    ({"tree_width": 102, "period": 2}, "tree_width must be in 1..101 (the vocabulary), got 102"),
    (
        {"tree_width": 3, "period": 343},
        "a period of 343 tokens in a tree of width 3 has 1027 nodes, more than 1024: "
        "lower period or tree_width",
    ),
    ({"tree_width": 101, "period": 12}, "has 1112 nodes, more than 1024: lower period or tree_w"),
    ({"tree_width": 0, "period": "auto"}, "tree_width must be in 1..101 (the vocabulary), got 0"),
    ({"tree_width": 34, "period": "auto"}, "a period of 32 tokens in a tree of width 34 has 1055"),
    # what is accepted, and how long drafts are
    ({"threshold": -0.5}, "threshold must be >= 0, got -0.5"),
    ({"threshold": math.nan}, "threshold must be >= 0, got nan"),
    ({"verify_temperature": 0.0}, "verify_temperature must be > 0, got 0"),
    ({"verify_temperature": -1.0}, "verify_temperature must be > 0, got -1"),
    ({"verify_temperature": math.inf}, "verify_temperature must be > 0, got inf"),
    ({"verify_temperature": math.nan}, "verify_temperature must be > 0, got nan"),
    ({"confidence": -0.1}, "confidence must be in [0, 1], got -0.1"),
    ({"confidence": 1.1}, "confidence must be in [0, 1], got 1.1"),
    ({"confidence": math.nan}, "confidence must be in [0, 1], got nan"),
    ({"refresh": -1}, "refresh must be >= 0 (0: never), got -1"),
    # sampling
    ({"temperature": 0.7}, f"temperature: mode sirius {GREEDY}"),
    ({"temperature": 1.0, "seed": 0, "mode": "exact"}, f"temperature, seed: mode exact {GREEDY}"),
    ({"top_k": 5}, f"top_k: mode sirius {GREEDY}"),
    ({"top_k": 5, "top_p": 0.9, "mode": "exact"}, f"top_k, top_p: mode exact {GREEDY}"),
    ({"seed": 0}, f"seed: mode sirius {GREEDY}"),
    ({"mode": "sample", "temperature": 0.0}, "temperature must be > 0, got 0.0"),
    ({"mode": "full", "temperature": -1.0}, "temperature must be > 0, got -1.0"),
    ({"mode": "sparse", "temperature": math.inf}, "temperature must be > 0, got inf"),
    ({"mode": "sample", "temperature": math.nan}, "temperature must be > 0, got nan"),
    ({"mode": "sample", "top_k": -1}, "top_k must be >= 0 (0: no limit), got -1"),
    ({"mode": "full", "top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
    ({"mode": "sparse", "top_p": 1.5}, "top_p must be in (0, 1], got 1.5"),
    ({"mode": "sample", "top_p": math.nan}, "top_p must be in (0, 1], got nan"),
    ({"mode": "sample", "seed": -1}, "seed must be >= 0, got -1"),
    ({"mode": "full", "seed": [-4]}, "seed must be >= 0, got -4"),
    ({"mode": "sample", "seed": []}, "seed: 0 seeds for 1 rows; give one, or one per row"),
    ({"mode": "sample", "seed": [1, 2]}, "seed: 2 seeds for 1 rows; give one, or one per row"),
    # lengths
    ({"max_new_tokens": 0}, f"max_new_tokens must be in 1..{ROOM} here (max_seq_len is 128"),
    ({"max_new_tokens": -1}, f"max_new_tokens must be in 1..{ROOM} here"),
    ({"max_new_tokens": ROOM + 1}, f"max_new_tokens must be in 1..{ROOM} here"),
    # the rest
    ({"stop": ""}, "a stop string is empty"),
    ({"stop": ["a", ""]}, "a stop string is empty"),
    ({"stop": 5}, "stop must be text, or a list of texts, got 5"),
    ({"stop": ["a", 5]}, "a stop string must be text, got 5; give token ids that end a row"),
    ({"stop": "a\ud800"}, "stop string 'a\\ud800' has a lone surrogate, which is not valid text"),
    ({"eos_token_id": "</s>"}, "eos_token_id has text ('</s>') instead of token ids"),
    ({"eos_token_id": 2.0}, "eos_token_id has a float (2.0) instead of token ids"),
    ({"eos_token_id": [[2]]}, "eos_token_id is nested too deep"),
]


@pytest.fixture(scope="module")
def expected(tiny: TinyModels) -> GenerationOutput:
    """Before any option was refused."""
    return tiny(method="griffin").model.generate(PROMPT, tree_width=2, max_new_tokens=10)


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_bad_options_are_refused_and_leave_no_trace(
    model: SiriusModel, expected: GenerationOutput, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        model.generate(PROMPT, **options)
    assert message in str(refused.value)
    output = model.generate(PROMPT, tree_width=2, max_new_tokens=10)
    assert output.tokens == expected.tokens
    assert output.stats.advances == expected.stats.advances


@pytest.mark.parametrize("method", ["topk", "cats", "none"])
@pytest.mark.parametrize("refresh", [1, -1])
def test_only_griffin_chooses_anew(tiny: TinyModels, method: str, refresh: int) -> None:
    model = tiny(method=method).model
    message = f"refresh applies to griffin, but the artifact's sparse path is {method}"
    with pytest.raises(ConfigError, match=message):
        model.generate(PROMPT, refresh=refresh)
    assert model.generate(PROMPT, refresh=0, max_new_tokens=3).tokens == (
        model.generate(PROMPT, max_new_tokens=3).tokens
    )


@pytest.mark.parametrize(
    "options",
    [
        {"period": 512},
        {"period": 342, "tree_width": 3},  # 1024 nodes
        {"period": 2, "tree_width": VOCABULARY},
        {"period": 1, "tree_width": VOCABULARY},
        {"period": 8, "confidence": 1.0, "tree_width": 2},
        {"refresh": 10**6},
        {"threshold": 0.0, "verify_temperature": 1e-3},
        {"mode": "sample", "seed": 2**70, "temperature": 1e-3, "top_k": 10**6, "top_p": 1e-9},
    ],
    ids=str,
)
def test_the_last_values_that_are_allowed(model: SiriusModel, options: dict[str, Any]) -> None:
    output = model.generate(PROMPT, max_new_tokens=10, eos_token_id=[], **options)
    assert len(output.tokens[0]) == 10


@pytest.mark.gate
def test_a_vocabulary_smaller_than_a_width_of_auto(tiny: TinyModels) -> None:
    """`auto` leaves the widths out that can't be drafted; one that was asked for is refused."""
    subject = tiny(method="topk", vocab_size=7)
    output = subject.model.generate([6], mode=Mode.EXACT, period="auto", max_new_tokens=30)
    assert output.tokens[0] == subject.greedy([6], 30)
    with pytest.raises(
        ConfigError, match=r"tree_width must be in 1\.\.7 \(the vocabulary\), got 8"
    ):
        subject.model.generate([6], period="auto", tree_width=8)


# a back end's own limits


def read(model: SiriusModel, limits: Limits, rows: int = 2, **options: Any) -> Request:
    new_tokens = options.pop("max_new_tokens", None)
    return read_options(
        Options(**options),
        model.program,
        limits,
        prompt_lengths=[len(PROMPT)] * rows,
        max_new_tokens=new_tokens,
        eos=frozenset(),
        stop=(),
    )


LIMITS = Limits(period=16, tree_width=1, rows=2, context=32)
BEYOND: list[tuple[dict[str, Any], str]] = [
    ({"period": 17}, "period must be in 1..16 here, got 17: the graph was compiled for that"),
    ({"tree_width": 2}, "tree_width must be 1 here, got 2: the graph was compiled for that"),
    ({"period": "auto"}, "period 'auto' needs separate times for drafting and verification"),
    ({"rows": 3}, "the batch has 3 rows, but the graph was compiled for 2; split it"),
    (
        {"max_new_tokens": 30},
        "max_new_tokens must be in 1..29 here (context is 32 tokens, the prompt has 3",
    ),
]


@pytest.mark.parametrize(("options", "message"), BEYOND, ids=lambda value: str(value)[:40])
def test_limits_of_a_compiled_period(
    model: SiriusModel, options: dict[str, Any], message: str
) -> None:
    for mode in (Mode.SIRIUS, Mode.EXACT, Mode.SAMPLE):
        with pytest.raises(UserError) as refused:
            read(model, LIMITS, mode=mode, **options)
        assert message in str(refused.value)
    for mode in (Mode.FULL, Mode.SPARSE):  # they run no periods
        assert read(model, LIMITS, mode=mode, **options).mode == mode


def test_what_a_compiled_period_allows(model: SiriusModel) -> None:
    request = read(model, LIMITS, period=16, tree_width=1, max_new_tokens=29)
    assert (request.period, request.widths, request.max_new_tokens) == (16, (1,), 29)
    assert read(model, LIMITS).max_new_tokens == 29


def test_a_prompt_without_room_in_the_context(model: SiriusModel) -> None:
    message = r"prompt has 3 tokens, but .* sequences of 3 .*\(context\); .* with a larger context"
    with pytest.raises(GenerationError, match=message):
        read(model, Limits(period=16, tree_width=1, context=3))


@pytest.mark.parametrize(
    ("period", "width", "message"),
    [
        (0, 1, "--period must be in 1..512, got 0"),
        (8, 9, "--tree-width must be in 1..8 (the vocabulary), got 9"),
        (400, 4, "has 1597 nodes, more than 1024: lower --period or --tree-width"),
    ],
)
def test_a_compiler_s_flags_are_named(period: int, width: int, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_tree(period, width, 8, flag="--")
    assert message in str(refused.value)


def test_a_compiler_s_ranges_are_named() -> None:
    with pytest.raises(ConfigError, match="--confidence must be in"):
        check_ranges(2.0, 0, flag="--")
    with pytest.raises(ConfigError, match="--refresh must be >= 0"):
        check_ranges(0.0, -1, flag="--")


# period auto


@given(st.lists(prompts, min_size=1, max_size=3), st.sampled_from([None, 1, 3]), st.booleans())
def test_auto_in_exact_mode_gives_the_dense_tokens(
    tiny: TinyModels, batch: list[list[int]], width: int | None, confident: bool
) -> None:
    """Whatever it chooses: that depends on the clock."""
    subject = tiny(method="griffin")
    output = subject.model.generate(
        batch,
        mode=Mode.EXACT,
        period="auto",
        tree_width=width,
        confidence=0.5 if confident else 0.0,
        max_new_tokens=30,
    )
    assert output.tokens == tuple(subject.greedy(prompt, 30) for prompt in batch)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_auto_reaches_the_length_limit(tiny: TinyModels, method: str) -> None:
    subject = tiny(method=method)
    output = subject.model.generate(
        PROMPT, mode=Mode.EXACT, period="auto", eos_token_id=[], max_new_tokens=ROOM
    )
    dense = subject.model.generate(PROMPT, mode=Mode.FULL, eos_token_id=[], max_new_tokens=ROOM)
    assert output.tokens == dense.tokens
    assert len(output.stats.advances) > 1  # else nothing was tried


# the length limit


@pytest.mark.parametrize("left", [1, 2, 7, 40])
@pytest.mark.parametrize(
    ("period", "width"),
    gate_but(
        [(1, 1), (2, 1), (16, 1), (512, 1), (2, VOCABULARY), (3, 7), (8, 8), (128, 8), (342, 3)],
        {(1, 1), (512, 1), (2, VOCABULARY), (8, 8)},
    ),
)
def test_a_sequence_fills_the_context_exactly(
    tiny: TinyModels, period: int, width: int, left: int
) -> None:
    subject: Tiny = tiny(method="topk")
    generator = torch.Generator().manual_seed(left)
    prompt = torch.randint(6, VOCABULARY, (MAX_SEQ_LEN - left,), generator=generator).tolist()
    options = {"period": period, "tree_width": width, "max_new_tokens": left}
    dense = subject.model.generate(prompt, mode=Mode.FULL, eos_token_id=[], max_new_tokens=left)
    exact = subject.model.generate(prompt, mode=Mode.EXACT, eos_token_id=[], **options)
    assert exact.tokens == dense.tokens
    # A threshold of 0 drafts as deep as it may.
    deepest = subject.model.generate(prompt, threshold=0.0, eos_token_id=[], **options)
    assert len(deepest.tokens[0]) == left
    with pytest.raises(GenerationError, match=rf"max_new_tokens must be in 1\.\.{left} here"):
        subject.model.generate(prompt, **{**options, "max_new_tokens": left + 1})


# prompts


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
