"""What tests' compilations share comes out as if each had made its own, to the byte."""

from __future__ import annotations

import json

import pytest

from sirius_compile.capture import Capture, capture
from sirius_compile.pipeline import front
from sirius_passes.build_period import BuildPeriod
from sirius_passes.lay_out_weights import LayOutWeights
from sirius_passes.manager import run_passes
from sirius_passes.sparsify_topk import SparsifyTopk
from sirius_runtime.graph import to_document
from sirius_runtime.spec import Method
from tests.support.families import small_config
from tests.support.once import BuildPeriodOnce, capture_once


def documents(captured: Capture, *build: BuildPeriod) -> str:
    """The graphs of all stages, at the end."""
    program = captured.program
    passes = [*front(Method.TOPK), SparsifyTopk(0.5), LayOutWeights(), *build]
    rewrites = [record.rewrites for record in run_passes(program, passes)]
    weights = [spec.name for spec in program.weights.values()]
    graphs = {name: to_document(module) for name, module in program.graphs.items()}
    return json.dumps([rewrites, weights, graphs])


@pytest.mark.gate
def test_what_is_captured_once_equals_what_is_captured_anew() -> None:
    config = small_config("llama", num_hidden_layers=1)
    expected = documents(capture(config))
    assert [documents(capture_once(config)) for _ in range(2)] == [expected] * 2
    other = small_config("llama", num_hidden_layers=1, attention_bias=True)
    assert documents(capture_once(other)) != expected


@pytest.mark.slow
def test_a_period_built_once_equals_one_built_anew() -> None:
    config = small_config("llama", num_hidden_layers=1)
    expected = documents(capture_once(config), BuildPeriod(3, 1, 64))
    again = [documents(capture_once(config), BuildPeriodOnce(3, 1, 64)) for _ in range(2)]
    assert again == [expected] * 2
    assert documents(capture_once(config), BuildPeriodOnce(2, 1, 64)) != expected
