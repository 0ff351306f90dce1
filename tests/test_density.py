"""Density, from a real model's config alone: the paper's own numbers, and no weights needed."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from sirius_compile.capture import capture
from sirius_compile.pipeline import front, sparsify
from sirius_compile.sparse_path import keep_for_density
from sirius_passes.manager import run_passes
from sirius_passes.program import Program, copy_program
from sirius_runtime.errors import ConfigError
from sirius_runtime.spec import Method

LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
)


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(LLAMA_3_8B).program


@pytest.fixture(scope="module")
def neurons(captured: Program) -> Program:
    """Paired, its MLPs raised to operators."""
    program = copy_program(captured)
    run_passes(program, front(Method.TOPK))
    return program


def density(program: Program, method: Method, keep: float) -> float:
    copy = copy_program(program)
    run_passes(copy, sparsify(method, keep, None))
    return copy.sparsity.density


# arXiv 2409.03856, table 5: GSM8K keeps half of the neurons, CSQA two fifths.
@pytest.mark.parametrize(
    ("method", "keep", "wanted", "paper"),
    [
        (Method.GRIFFIN, 0.5, 0.649, 0.65),
        (Method.TOPK, 0.5, 0.766, 0.76),
        (Method.CATS, 0.5, 0.766, 0.76),
        (Method.GRIFFIN, 0.4, 0.579, 0.58),
        (Method.TOPK, 0.4, 0.719, 0.72),
        (Method.GRIFFIN_TEAL, 0.5, 0.448, None),
    ],
)
def test_llama_3_8b(
    neurons: Program, method: Method, keep: float, wanted: float, paper: float | None
) -> None:
    found = density(neurons, method, keep)
    assert found == pytest.approx(wanted, abs=5e-4)
    assert paper is None or abs(found - paper) < 0.01


def test_teal_reads_its_share_of_every_projection(captured: Program) -> None:
    program = copy_program(captured)
    run_passes(program, front(Method.TEAL))
    embeddings = 2 * 128256 * 4096
    layers = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
    norms = (2 * 32 + 1) * 4096
    total = embeddings + layers + norms
    for keep in (0.5, 0.35):
        expected = (embeddings + norms + keep * layers) / total
        assert density(program, Method.TEAL, keep) == pytest.approx(expected, rel=1e-9)
    copy = copy_program(program)
    run_passes(copy, sparsify(Method.TEAL, 0.5, None))
    assert len(copy.sparsity.sites) == 32 * 7
    assert [site.layer for site in copy.sparsity.sites] == [i // 7 for i in range(32 * 7)]


@pytest.mark.parametrize("wanted", [0.6, 0.45])
def test_the_share_that_reaches_a_density_is_found(neurons: Program, wanted: float) -> None:
    method = Method.GRIFFIN_TEAL if wanted < 0.5 else Method.GRIFFIN
    keep = keep_for_density(wanted, lambda share: density(neurons, method, share), method)
    assert density(neurons, method, keep) == pytest.approx(wanted, abs=5e-4)


def test_a_density_out_of_reach_is_refused(neurons: Program) -> None:
    with pytest.raises(ConfigError, match=r"topk: with 1% kept it still reads 0.53\d of the"):
        keep_for_density(0.4, lambda k: density(neurons, Method.TOPK, k), Method.TOPK)
    with pytest.raises(ConfigError, match=r"griffin\+teal: with 5% kept it still reads 0.15\d"):
        keep_for_density(
            0.1, lambda k: density(neurons, Method.GRIFFIN_TEAL, k), Method.GRIFFIN_TEAL
        )


def test_dense_layers_read_everything(neurons: Program) -> None:
    copy = copy_program(neurons)
    run_passes(copy, sparsify(Method.TOPK, 0.5, None, dense_layers=(0, 31)))
    spec = copy.sparsity
    assert spec.dense_layers == (0, 31)
    assert [site.layer for site in spec.sites] == list(range(1, 31))
    assert 1 - spec.density == pytest.approx(
        (1 - density(neurons, Method.TOPK, 0.5)) * 30 / 32, rel=1e-6
    )
