"""Density from a real model's config, without weights, against the paper's numbers."""

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
from tests.support.fast import slow_but

VOCABULARY = 128256


def llama_3_8b(layers: int) -> LlamaConfig:
    """Llama-3-8B, or that many of its 32 layers with as large a share of the vocabulary: its
    density is the same.
    """
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=VOCABULARY * layers // 32,
        max_position_embeddings=8192,
    )


@pytest.fixture(scope="module", params=slow_but((2, 32), (), {2}), ids="{} layers".format)
def layers(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def captured(layers: int) -> Program:
    return capture(llama_3_8b(layers)).program


@pytest.fixture(scope="module")
def neurons(captured: Program) -> Program:
    """A paired program whose MLPs are operators."""
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


def test_teal_reads_its_share_of_every_projection(captured: Program, layers: int) -> None:
    program = copy_program(captured)
    run_passes(program, front(Method.TEAL))
    embeddings = 2 * (VOCABULARY * layers // 32) * 4096
    linears = layers * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
    norms = (2 * layers + 1) * 4096
    total = embeddings + linears + norms
    for keep in (0.5, 0.35):
        expected = (embeddings + norms + keep * linears) / total
        assert density(program, Method.TEAL, keep) == pytest.approx(expected, rel=1e-9)
    copy = copy_program(program)
    run_passes(copy, sparsify(Method.TEAL, 0.5, None))
    assert len(copy.sparsity.sites) == layers * 7
    assert [site.layer for site in copy.sparsity.sites] == [i // 7 for i in range(layers * 7)]


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


def test_dense_layers_read_everything(neurons: Program, layers: int) -> None:
    copy = copy_program(neurons)
    dense = tuple(sorted({0, layers - 2}))  # of two layers the first, of more two
    run_passes(copy, sparsify(Method.TOPK, 0.5, None, dense_layers=dense))
    spec = copy.sparsity
    assert spec.dense_layers == dense
    sparse = [layer for layer in range(layers) if layer not in dense]
    assert [site.layer for site in spec.sites] == sparse
    assert 1 - spec.density == pytest.approx(
        (1 - density(neurons, Method.TOPK, 0.5)) * len(sparse) / layers, rel=1e-6
    )
