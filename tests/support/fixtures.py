"""Fixtures of all tests; `tests/conftest.py` loads them."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator

import pytest
import torch

from sirius_compile import CompileConfig, compile_model
from sirius_compile.product import Compiled
from tests.support.models import TinyModels, random_decoder, word_tokenizer, write_calibration
from tests.support.once import compiling_once
from tests.support.onnx import Pairs

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What imports and collection have made stays to the end. The collector, which traces of graphs
    start again and again, need not go through it: that takes 5% of a compilation.
    """
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """What is there once a file's tests and fixtures have ended stays as well: graphs captured and
    models compiled for the session. That takes another 5%, and whole collections are quick.
    """
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    """So that Python ends as usual."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def once() -> Iterator[None]:
    """Compilations alike capture once: see `tests.support.once`."""
    with compiling_once():
        yield


@pytest.fixture(autouse=True)
def _drafts_whatever_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models draft badly, and what the guard chooses depends on the clock: tests of what
    periods do ask for all of them. Those of the guard say `fallback=True`.
    """
    monkeypatch.setattr("sirius_runtime.request.FALLBACK", False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Tiny random decoders by family, sparsity and config: see `tests.support.models`."""
    return TinyModels(write_calibration(tmp_path_factory.mktemp("calibration") / "words.txt"))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Artifacts behind PyTorch and behind ONNX Runtime."""
    return Pairs(tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def whole() -> Compiled:
    """A tiny Llama compiled for griffin, with the graph of a whole period."""
    options = CompileConfig(sparsity="griffin", period=4)
    return compile_model(random_decoder("llama"), options, tokenizer=word_tokenizer())
