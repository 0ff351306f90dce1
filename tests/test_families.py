"""Every family of the table: logits equal to transformers' eager model, by prefill, chunks and
single tokens, and its greedy tokens; every refusal of the table, in its words.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sirius_compile import CompileConfig, compile_model
from sirius_compile.capture import capture
from sirius_compile.checkpoint import open_weights
from sirius_compile.families import FAMILIES, REFUSED, Family, Refused
from sirius_compile.models import ModelSource, load_config
from sirius_compile.pipeline import front
from sirius_passes.manager import run_passes
from sirius_passes.mixtures import mixtures
from sirius_passes.program import FULL, calls
from sirius_passes.recognise_mlps import DENSE_MLP
from sirius_runtime import Mode
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.spec import Method
from tests.support.families import (
    CONFIGS,
    Caches,
    Pair,
    assert_close,
    padded,
    random_model,
    random_rows,
    small_config,
)
from tests.support.fast import slow_but
from tests.support.models import word_tokenizer, write_calibration

LENGTHS = (5, 19, 11)
NEW_TOKENS = 12
ROWS = random_rows(*LENGTHS)
COUNTS = torch.tensor(LENGTHS)


def method_of(family: Family) -> Method:
    """One of the family's methods; families take turns."""
    alike = [other for other in FAMILIES if other.methods == family.methods]
    return family.methods[alike.index(family) % len(family.methods)]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("families") / "words.txt", 80)


FAST = ("llama", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "deepseek_v3")
GATE = ("gemma3_text", "smollm3", "glm4", "cohere", "opt", "qwen2_moe")
"""One family for each kind of MLP, mask, rotary embedding and fusion: the fast suite has those of
most kinds at once, the gate the others. All further families are slow tests.
"""
MARKS = {**dict.fromkeys(FAST, ()), **dict.fromkeys(GATE, (pytest.mark.gate,))}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            family,
            id=family.model_type,
            marks=MARKS.get(family.model_type, pytest.mark.slow),
        )
        for family in FAMILIES
    ],
)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def pair(family: Family, calibration: Path) -> Pair:
    options = CompileConfig(sparsity=method_of(family), calibration=calibration, graphs="entries")
    model = random_model(family.model_type)
    compiled = compile_model(model, options, tokenizer=word_tokenizer())
    graph = compiled.program.graphs[FULL].graph
    if options.sparsity != Method.TEAL:  # which sees linears, no MLPs
        kinds = [bool(calls(graph, DENSE_MLP)), bool(mixtures(graph))]
        assert kinds == [family.mlp != "experts", "experts" in family.mlp], "as the table says"
    return Pair(random_model(family.model_type), compiled.to_runtime())


def test_prefill_gives_the_last_logits_of_each_row(pair: Pair) -> None:
    logits = Caches(pair.backend, len(ROWS)).feed(padded(ROWS), COUNTS, "prefill")
    for row, tokens in enumerate(ROWS):
        assert_close(logits[row, 0], pair.reference(tokens)[-1])


def test_one_token_steps_over_ragged_rows(pair: Pair) -> None:
    caches = Caches(pair.backend, len(ROWS))
    caches.feed(padded([tokens[:-3] for tokens in ROWS]), COUNTS - 3, "prefill")
    expected = [pair.reference(tokens)[-3:] for tokens in ROWS]
    for step in range(3):
        ids = torch.tensor([[tokens[step - 3]] for tokens in ROWS])
        logits = caches.feed(ids, torch.ones(len(ROWS), dtype=torch.int64))
        for row in range(len(ROWS)):
            assert_close(logits[row, 0], expected[row][step])


def test_chunks_over_ragged_rows(pair: Pair) -> None:
    caches = Caches(pair.backend, len(ROWS))
    counts = torch.tensor([2, 12, 7])
    caches.feed(padded([t[:n] for t, n in zip(ROWS, counts, strict=True)]), counts, "prefill")
    rest = [t[n:] for t, n in zip(ROWS, counts, strict=True)]
    logits = caches.feed(padded(rest), COUNTS - counts)
    for row, tokens in enumerate(ROWS):
        expected = pair.reference(tokens)[counts[row] :]
        assert_close(logits[row, : len(rest[row])], expected)


def test_exact_mode_gives_transformers_greedy_tokens(pair: Pair, family: Family) -> None:
    width = 1 + 2 * (FAMILIES.index(family) % 2)
    output = pair.compiled.generate(
        ROWS,
        mode=Mode.EXACT,
        period=5,
        tree_width=width,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=[],
    )
    for tokens, row in zip(output.tokens, ROWS, strict=True):
        greedy = pair.model.generate(
            torch.tensor([row]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(tokens) == greedy[0, len(row) :].tolist()


def test_the_sparse_path_skips_in_every_layer_of_its_kind(pair: Pair, family: Family) -> None:
    sparsity = pair.backend.program.sparsity
    assert sparsity.method is method_of(family)
    every = set(range(pair.backend.program.state.layers))
    dense = {0} if family.model_type == "qwen3_moe" and sparsity.method is Method.EXPERTS else set()
    assert {site.layer for site in sparsity.sites} == every - dense
    assert 0.3 < sparsity.density < 1.0


def test_every_method_is_run_on_some_family() -> None:
    assert {method_of(family) for family in FAMILIES} == {
        method for family in FAMILIES for method in family.methods
    }


def test_the_table_names_each_type_once_and_has_every_config() -> None:
    names = [row.model_type for row in (*FAMILIES, *REFUSED)]
    assert len(set(names)) == len(names)
    assert len(FAMILIES) >= 25
    assert CONFIGS.keys() <= set(names)


@pytest.mark.parametrize(
    "model_type",
    slow_but(("gpt2", "opt", "mixtral", "gpt_oss", "granitemoe"), {"gpt2", "mixtral"}, {"gpt_oss"}),
)
def test_a_checkpoint_holds_the_weights(model_type: str, tmp_path: Path) -> None:
    """Some families store weights under other names than the model's, or expert by expert."""
    model = random_model(model_type)
    model.save_pretrained(tmp_path)
    source = ModelSource(tmp_path, model_type, None, False)
    config = load_config(source)
    captured = capture(config)
    warnings: list[str] = []
    weights = open_weights(source, config, captured.wanted, warnings.append)
    assert not warnings
    expected = dict(model.named_parameters())
    for name in captured.wanted.shapes:
        assert torch.equal(weights.get(name), expected[name]), name


# refusals


def refuse(model_type: str, directory: Path) -> None:
    """Runs the compiler on a model without weights, up to the opening of weights."""
    small_config(model_type).save_pretrained(directory)
    config = load_config(ModelSource(directory, model_type, None, False))
    run_passes(capture(config).program, front(Method.TOPK))


REASONS = {refused.reason: refused for refused in reversed(REFUSED)}
"""One type for each reason; further types are slow tests."""

SLOW_REASONS = {"jamba", "recurrent_gemma", "lfm2", "diffllama", "deepseek_v2"}
GATE_REASONS = {"llama4_text", "apertus"}
"""Types that are refused only after (almost) the whole model is built and traced."""


@pytest.mark.parametrize(
    "refused",
    slow_but(
        REFUSED,
        [r for r in REASONS.values() if r.model_type not in SLOW_REASONS | GATE_REASONS],
        [r for r in REASONS.values() if r.model_type in GATE_REASONS],
    ),
    ids=lambda refused: refused.model_type,
)
def test_refused_before_weights_are_opened(refused: Refused, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        refuse(refused.model_type, tmp_path)
    assert refused.reason in str(refusal.value)


@pytest.mark.parametrize("model_type", slow_but(("apertus", "bitnet"), (), {"apertus"}))
def test_a_model_of_unknown_mlps_stays_dense_with_sparsity_none(model_type: str) -> None:
    program = capture(small_config(model_type)).program
    run_passes(program, front(Method.NONE))
    assert not calls(program.graphs[FULL].graph, DENSE_MLP)
