"""Threads that compile at the same time: each result is the same as alone."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from transformers import PreTrainedModel

from sirius_compile import CompileConfig, Compiled, compile_model
from sirius_passes.tracing import one_at_a_time
from tests.support.models import random_decoder, word_tokenizer
from tests.support.once import compiling_anew

FAMILIES = (("llama", "topk"), ("gpt2", "griffin"))


def compiled(model: PreTrainedModel, method: str, graphs: str) -> Compiled:
    options = CompileConfig(sparsity=method, period=2, graphs=graphs)
    return compile_model(model, options, tokenizer=word_tokenizer())


def content(made: Compiled) -> dict[str, str]:
    graphs = {name: json.dumps(made.document(name)) for name in made.program.graphs}
    return graphs | {"sites": str(made.spec.sparsity), "weights": str(made.spec.weights)}


@pytest.mark.slow
@pytest.mark.parametrize("graphs", ["entries", pytest.param("torch", marks=pytest.mark.slow)])
def test_each_thread_gets_what_it_gets_alone(graphs: str) -> None:
    asked = [
        (random_decoder(family, num_hidden_layers=1), method, graphs) for family, method in FAMILIES
    ]
    with compiling_anew():
        alone = [content(compiled(*one)) for one in asked]
    at_once = Barrier(len(asked))

    def run(one: tuple[PreTrainedModel, str, str]) -> dict[str, str]:
        at_once.wait()
        return content(compiled(*one))

    with compiling_anew(), ThreadPoolExecutor(len(asked)) as threads:
        assert list(threads.map(run, asked)) == alone


def test_functions_that_trace_wait_for_each_other() -> None:
    """Holds for any two decorated functions, and one may call the other."""
    within: list[str] = []

    @one_at_a_time
    def inner(name: str) -> int:
        within.append(name)
        others = len(within)
        time.sleep(0.01)
        within.remove(name)
        return others

    @one_at_a_time
    def outer(name: str) -> int:
        return inner(name)

    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(f, str(i)) for i in range(4) for f in (inner, outer)]
        assert [call.result() for call in calls] == [1] * len(calls)
