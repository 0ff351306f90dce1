"""Threads that compile at once: each gets what it would have got alone."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from transformers import PreTrainedModel

from sirius_compile import CompileConfig, Compiled, compile_model
from tests.support.models import random_decoder, word_tokenizer, write_calibration

MODELS = (("llama", "cats"), ("gpt2", "griffin"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("text") / "words.txt", 64)


def compiled(model: PreTrainedModel, method: str, text: Path) -> Compiled:
    options = CompileConfig(sparsity=method, period=3, calibration=text)
    return compile_model(model, options, tokenizer=word_tokenizer())


def content(made: Compiled) -> dict[str, str]:
    graphs = {name: json.dumps(made.document(name)) for name in made.program.graphs}
    return graphs | {"sites": str(made.spec.sparsity), "weights": str(made.spec.weights)}


def test_each_thread_gets_what_it_gets_alone(text: Path) -> None:
    asked = [(random_decoder(family), method) for family, method in MODELS]
    alone = [content(compiled(*one, text)) for one in asked]
    at_once = Barrier(len(asked))

    def run(one: tuple[PreTrainedModel, str]) -> dict[str, str]:
        at_once.wait()
        return content(compiled(*one, text))

    with ThreadPoolExecutor(len(asked)) as threads:
        assert list(threads.map(run, asked)) == alone
