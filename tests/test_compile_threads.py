"""Threads that compile at once: each gets what it would have got alone."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from transformers import PreTrainedModel

from sirius_compile import CompileConfig, Compiled, compile_model
from tests.support.models import random_decoder, word_tokenizer
from tests.support.once import compiling_anew

MODELS = (("llama", "topk", "torch"), ("gpt2", "griffin", "entries"))


def compiled(model: PreTrainedModel, method: str, graphs: str) -> Compiled:
    options = CompileConfig(sparsity=method, period=2, graphs=graphs)
    return compile_model(model, options, tokenizer=word_tokenizer())


def content(made: Compiled) -> dict[str, str]:
    graphs = {name: json.dumps(made.document(name)) for name in made.program.graphs}
    return graphs | {"sites": str(made.spec.sparsity), "weights": str(made.spec.weights)}


def test_each_thread_gets_what_it_gets_alone() -> None:
    asked = [(random_decoder(family, num_hidden_layers=1), *how) for family, *how in MODELS]
    with compiling_anew():
        alone = [content(compiled(*one)) for one in asked]
    at_once = Barrier(len(asked))

    def run(one: tuple[PreTrainedModel, str, str]) -> dict[str, str]:
        at_once.wait()
        return content(compiled(*one))

    with compiling_anew(), ThreadPoolExecutor(len(asked)) as threads:
        assert list(threads.map(run, asked)) == alone
