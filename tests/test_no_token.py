"""Where no token can be chosen, `generate` says so: it never goes on with token 0."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from sirius_compile import CompileConfig, compile_model
from sirius_runtime import load
from sirius_runtime.errors import GenerationError
from sirius_runtime.model import SiriusModel
from sirius_runtime.policy import (
    Draft,
    draw,
    judge,
    likeliest,
)
from sirius_runtime.recorded import run_at_once
from sirius_runtime.rules import Noise
from sirius_runtime.sampling import NO_TOKEN, Sampling
from sirius_runtime.tree import attach, plant
from tests.support.models import TinyModels, random_decoder, word_tokenizer
from tests.support.onnx import load_onnx
from tests.support.rules import drawn, sampled
from tests.test_static_session import static

NAN, INF = float("nan"), float("inf")
PROMPTS = [[7, 8, 9], [14, 50, 30, 11]]
SOUND = [33]
NEW = 16
SPOILT, ITS_PLACE = 73, 4
"""A token whose embedding is NaN, and so are all logits from it on; where the sound model says it
first after the first prompt.
"""
FORCED: dict[str, Any] = {"begin_suppress_tokens": [t for t in range(101) if t != SPOILT]}

RUNS: list[dict[str, Any]] = [
    {"mode": "exact", "period": 4},
    {"mode": "sirius", "period": 4},
    {"mode": "sirius", "threshold": 0.0, "period": 4},
    {"mode": "sample", "seed": 1, "period": 4},
    {"mode": "full"},
    {"mode": "full", "seed": 2},
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_decoder("llama")
    compiled = compile_model(
        model,
        CompileConfig(sparsity="griffin", period=4, graphs="both"),
        tokenizer=word_tokenizer(),
    )
    with torch.no_grad():  # after the compiler has looked
        model.get_input_embeddings().weight[SPOILT] = NAN
    return compiled.save(tmp_path_factory.mktemp("artifact") / "nan.sirius")


@pytest.mark.parametrize("backend", ["eager", "static", "period", "onnxruntime"])
def test_logits_of_nan_end_in_an_error_that_says_so(artifact: Path, backend: str) -> None:
    if backend == "onnxruntime":
        model = load_onnx(artifact)
    else:
        model = load(artifact, backend="period" if backend == "period" else "eager", device="cpu")
    if backend == "static":
        model, _ = static(model, run_at_once)
    for options in RUNS:
        prompts = [*PROMPTS, [9, SPOILT]]
        with pytest.raises(GenerationError, match=r"^token 1 .* full path's .* NaN or infinite"):
            model.generate(prompts, max_new_tokens=NEW, **options)
        if options["mode"] != "sample" and "seed" not in options:  # and within a period
            # Beside a draft of it what comes before may be NaN too: 0 times NaN is.
            with pytest.raises(GenerationError, match=rf"^token ({ITS_PLACE}|{ITS_PLACE + 1}) "):
                model.generate(PROMPTS[:1], max_new_tokens=NEW, **options | {"threshold": 2.0})
        model.generate([SOUND], max_new_tokens=2, **options)  # serves the next one all the same


def test_a_state_that_is_lent_again_holds_no_nan(artifact: Path) -> None:
    eager = load(artifact, backend="eager", device="cpu")
    model, recordings = static(eager, run_at_once)
    options: dict[str, Any] = {"mode": "exact", "period": 4, "max_new_tokens": 4, "tree_width": 3}
    with pytest.raises(GenerationError):
        model.generate([[9, *[SPOILT] * 20]], **options)
    gc.collect()  # the error held on to what it ended
    assert len(recordings._idle) == 1
    assert model.generate([SOUND], **options).tokens == eager.generate([SOUND], **options).tokens


def after_the_first(model: SiriusModel, **options: Any) -> None:
    """The spoilt token is the first of the answer: the draft begins with it."""
    model.generate(PROMPTS, max_new_tokens=NEW, **FORCED, **options)


@pytest.mark.parametrize("options", [*RUNS, {"mode": "exact", "tree_width": 3, "period": 4}])
def test_so_do_those_within_a_period(artifact: Path, options: dict[str, Any]) -> None:
    model = load(artifact, backend="eager", device="cpu")
    with pytest.raises(GenerationError, match=r"^token 2 of an answer can't be chosen: the full"):
        after_the_first(model, **options)
    with pytest.raises(GenerationError, match=r"^token 2 .* begin_suppress_tokens forbid every"):
        after_the_first(model, logprobs=2, **options)
    told = model.generate(
        PROMPTS, max_new_tokens=NEW, remove_invalid_values=True, **FORCED, **options
    )
    assert all(tokens[0] == SPOILT for tokens in told.tokens)  # what is asked for goes on


def test_the_sparse_path_is_named_where_it_is_alone(artifact: Path) -> None:
    model = load(artifact, backend="eager", device="cpu")
    for options in ({"mode": "sparse"}, {"mode": "sparse", "seed": 3}):
        with pytest.raises(GenerationError, match=r"^token 2 .* the sparse path's logits"):
            after_the_first(model, **options)


def test_what_forbids_every_token_is_named(tiny: TinyModels) -> None:
    model = tiny(method="topk").model
    for mode in ("exact", "sample", "full"):
        with pytest.raises(GenerationError, match=r"Or suppress_tokens forbid every token"):
            model.generate(PROMPTS, mode=mode, suppress_tokens=list(range(101)))


def test_an_end_before_the_fault_is_an_end(artifact: Path) -> None:
    """What lies beyond a row's end was never chosen."""
    model = load(artifact, backend="eager", device="cpu")
    output = model.generate(
        PROMPTS, mode="exact", max_new_tokens=NEW, eos_token_id=SPOILT, **FORCED
    )
    assert output.tokens == ((SPOILT,), (SPOILT,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_of_logits_that_are_not_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor(
        [
            [1.0, 3.0, 3.0],
            [1.0, NAN, 3.0],
            [NAN, NAN, NAN],
            [-INF, -INF, -INF],
            [-INF, 0.0, -INF],
            [1.0, INF, 2.0],
        ],
        dtype=dtype,
    )
    wanted = [1, NO_TOKEN, NO_TOKEN, NO_TOKEN, 1, NO_TOKEN]
    assert likeliest(logits).tolist() == wanted


def test_nothing_is_drawn_of_weights_that_are_not_finite() -> None:
    weights = torch.tensor([[0.5, 0.5], [NAN, 0.5], [NAN, NAN], [0.0, 0.0]])
    assert draw(weights, torch.full((4,), 0.9).double()).tolist() == [1, NO_TOKEN, NO_TOKEN, 1]


def test_a_sparse_path_of_nan_costs_drafts_and_biases_nothing() -> None:
    """Its draft is token 0 for certain: kept with p(0), else replaced by what is left of p."""
    p = torch.tensor([0.3, 0.5, 0.2])
    rows = 4096
    noise = Noise.unpack(
        torch.rand(rows, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    )
    tree = plant(torch.ones(rows, dtype=torch.int64), 2, 1)
    propose = drawn(Sampling(), noise, 1.0)
    level, q = propose(tree, torch.full((rows, 1, 3), NAN), torch.tensor(1))
    assert q is not None
    assert q[0].tolist() == [1.0, 0.0, 0.0]
    tree = attach(tree, level, torch.tensor(1))
    draft = Draft(tree, torch.ones(rows, dtype=torch.int64), q[:, None])
    logits = p.log().expand(rows, 2, 3)
    verdict = judge(draft, logits, sampled(Sampling(), noise), torch.full((rows,), 2), period=2)
    share = torch.bincount(verdict.tokens[:, 0], minlength=3) / rows
    assert share.tolist() == pytest.approx(p.tolist(), abs=0.03)
