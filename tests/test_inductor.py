"""Backend `inductor`: the entries compiled once, and nothing while it generates.

Compiling costs seconds a bucket: one test compiles few, and holds all that they can show.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks import gpu_check
from sirius_compile import CompileConfig, compile_model
from sirius_compile.product import Compiled
from sirius_runtime import load
from sirius_runtime.backends.inductor import InductorBackend
from sirius_runtime.backends.inductor_cache import INDUCTOR_VARIABLE
from sirius_runtime.decoder import Way
from sirius_runtime.errors import BackendError
from sirius_runtime.graph import to_document
from sirius_runtime.kernels.native import references
from sirius_runtime.model import GenerationOutput, SiriusModel
from tests.support.counts import counted_alike
from tests.support.kernels import require_compiler
from tests.support.models import (
    METHODS,
    Rows,
    open_session,
    random_decoder,
    state_of,
    word_tokenizer,
    write_calibration,
)

RAGGED = [[7, 8, 9], [50, 30, 11, 22, 60], [4 * i + 7 for i in range(15)]]
NEW = 24


@dataclass
class Pair:
    """A compiled model behind `eager` and behind `inductor`, and what the latter said."""

    eager: SiriusModel
    inductor: SiriusModel
    told: list[str]

    @property
    def backend(self) -> InductorBackend:
        assert isinstance(self.inductor.backend, InductorBackend)
        return self.inductor.backend

    def agree(self, prompts: Rows, **options: Any) -> GenerationOutput:
        options = {"max_new_tokens": NEW, "eos_token_id": []} | options
        wanted = self.eager.generate(prompts, **options)
        found = self.inductor.generate(prompts, **options)
        assert found.tokens == wanted.tokens
        names = "advances density effective_density acceptance_rate"
        for name in counted_alike(names, options["eos_token_id"]):
            assert getattr(found.stats, name) == getattr(wanted.stats, name), name
        return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("calibration") / "words.txt")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder of this test alone, but for the kernels, which are built."""
    require_compiler()
    torch.ops.sirius.linear(torch.ones(1, 1), torch.ones(1, 1))
    monkeypatch.setenv(INDUCTOR_VARIABLE, str(tmp_path / "of others"))
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):  # no pool of processes
        yield tmp_path / "cache" / "inductor"


def compiled_of(text: Path, method: str, **config: object) -> Compiled:
    options = CompileConfig(sparsity=method, period=8, calibration=text, graphs="entries")
    return compile_model(random_decoder("llama", **config), options, tokenizer=word_tokenizer())


@pytest.fixture(scope="module")
def small(text: Path) -> Compiled:
    """One layer of `cats`."""
    return compiled_of(text, "cats", num_hidden_layers=1)


def behind_inductor(compiled: Compiled) -> Pair:
    told: list[str] = []
    backend = InductorBackend(
        compiled.spec,
        {name: to_document(graph) for name, graph in compiled.program.graphs.items()},
        {spec.name: compiled.weights(spec) for spec in compiled.spec.weights},
        dtype=torch.float32,
        device=torch.device("cpu"),
        progress=told.append,
    )
    return Pair(compiled.to_runtime(), SiriusModel(backend, None), told)


def compilations() -> tuple[int, int]:
    """Graphs that dynamo captured, and those that inductor compiled or found."""
    return counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"]


@pytest.mark.slow
def test_entries_are_compiled_once(small: Compiled, cache: Path) -> None:
    pair = behind_inductor(small)
    pair.agree(RAGGED[:1])
    pair.agree(RAGGED[:1], mode="full")  # and where a period has room for one token alone
    entries = ["full", "full", "prefill", "sparse"]
    assert sorted(entry for entry, _ in pair.backend.buckets) == entries
    assert len(pair.told) == len(entries)
    assert all(f"the code is kept in {cache}" in line for line in pair.told)
    assert os.environ[INDUCTOR_VARIABLE] == str(cache.parents[1] / "of others")
    assert (cache / "fxgraph").exists()

    warm = compilations()
    # Attention over the last one's tokens is torch's own: kernels take 64.
    for prompt in (*RAGGED, list(range(7, 90))):
        for period in (2, 4, 8):
            pair.agree([prompt], period=period)
        pair.agree([prompt], confidence=0.5, mode="exact")
        pair.agree([prompt], mode="sample", seed=3)
        pair.agree([prompt], mode="full")
    # What it chooses depends on the clock; exact tokens do not.
    auto: dict[str, Any] = {"period": "auto", "tree_width": 1, "mode": "exact"}
    tokens = [model.generate([prompt], **auto).tokens for model in (pair.eager, pair.inductor)]
    assert tokens[0] == tokens[1]
    pair.agree(RAGGED[:1], max_new_tokens=100)  # more cache slots
    assert compilations() == warm

    writes_the_caches_in_place(pair)


def writes_the_caches_in_place(pair: Pair) -> None:
    """Nothing as large as a layer's cache is allocated in a step; and q, k and v are one call."""
    session = open_session(pair.inductor, 1, 1 << 16)
    with torch.inference_mode():
        # as a decoder's, whose tensors are made in this mode
        for name, value in state_of(session).items():
            setattr(session.state, name, value.clone())
        session.prefill([RAGGED[2]])
        caches = state_of(session)
        pointers = {name: tensor.data_ptr() for name, tensor in caches.items()}
        layer = caches["k_cache"][0].nbytes
        session.step(Way.DENSE)
        assert largest_allocation(partial(session.step, Way.DENSE)) < layer / 8
        assert largest_allocation(partial(session.step, Way.SPARSE)) < layer / 8
        assert largest_allocation(caches["k_cache"][0].clone) >= layer
        with profile(activities=[ProfilerActivity.CPU]) as watch:
            session.step(Way.DENSE)
        names = [event.name for event in watch.events()]
        # One layer's; by themselves are its o and the head.
        assert (names.count("sirius::linears"), names.count("sirius::linear")) == (1, 2)
    assert {name: tensor.data_ptr() for name, tensor in state_of(session).items()} == pointers
    assert int(session.state.length) == len(RAGGED[2]) + 4
    written = caches["k_cache"][0, 0, 0].abs().sum(-1) > 0
    assert written.sum() == len(RAGGED[2]) + 4


def largest_allocation(call: Callable[[], object]) -> int:
    """Bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        call()
    return max(event.self_cpu_memory_usage for event in watch.events())


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 4, 70])  # kernels take up to 64
def test_operators_return_what_their_fakes_promise(tokens: int) -> None:
    """Compiled code goes by shapes and strides that it never sees."""
    for dtype in (torch.float32, torch.bfloat16):
        for kind in gpu_check.KINDS:
            for case in kind(dtype, 2, tokens, 32):
                operator = getattr(torch.ops.sirius, case.name)
                # Queries, keys and values lie as linears leave them: heads within tokens.
                arguments = [by_tokens(value) for value in case.arguments]
                with FakeTensorMode() as mode:
                    given = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
                    promised = tree_leaves(operator(*given))
                for within in (nullcontext, references):
                    with within():
                        found = tree_leaves(operator(*arguments))
                    assert layouts(found) == layouts(promised), (case.name, within)


def by_tokens(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim == 4:
        return value.transpose(1, 2).contiguous().transpose(1, 2)
    return value


def layouts(tensors: list[torch.Tensor]) -> list[tuple[object, ...]]:
    return [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method(text: Path, method: str) -> None:
    pair = behind_inductor(compiled_of(text, method))

    def generate() -> None:
        for width in (1, 2):
            for prompts in (RAGGED[:1], RAGGED):
                for options in ({}, {"mode": "exact"}, {"mode": "sample", "seed": 1}):
                    pair.agree(prompts, tree_width=width, **options)
                    pair.agree(prompts, tree_width=width, confidence=0.5, **options)
                if "griffin" in method:
                    pair.agree(prompts, tree_width=width, refresh=2)
        ends = pair.eager.generate(RAGGED, eos_token_id=[], mode="exact").tokens
        pair.agree(RAGGED, mode="exact", eos_token_id=[ends[0][2], ends[1][11]])
        pair.agree(RAGGED, mode="full")
        pair.agree(RAGGED, mode="sparse")

    generate()
    warm = compilations()
    generate()
    assert compilations() == warm
    assert len(pair.told) == len(pair.backend.buckets)


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_code_is_found_again(small: Compiled) -> None:
    behind_inductor(small).agree(RAGGED[:1])
    torch._dynamo.reset()
    before = counters["inductor"]["fxgraph_cache_miss"]
    behind_inductor(small).agree(RAGGED[:1])
    assert counters["inductor"]["fxgraph_cache_miss"] == before > 0
    assert counters["inductor"]["fxgraph_cache_hit"] > 0


@pytest.mark.slow
def test_other_dtypes(text: Path) -> None:
    compiled = compiled_of(text, "topk", num_hidden_layers=1)
    backend = compiled.to_runtime(dtype="bfloat16", backend="inductor")
    output = backend.generate(RAGGED[:1], max_new_tokens=NEW, eos_token_id=[])
    assert output.stats.tokens == NEW


# what is refused


def test_no_compiler(small: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        BackendError, match=r"no-such-compiler.*install g\+\+.*or use backend eager"
    ):
        small.to_runtime(backend="inductor")


@pytest.mark.slow
def test_a_compiler_that_fails(small: Compiled, tmp_path: Path) -> None:
    broken = tmp_path / "broken-g++"
    broken.write_text('#!/bin/sh\ncase "$*" in *--version*) echo "g++ 1.0";; *) exit 1;; esac\n')
    broken.chmod(0o755)
    model = small.to_runtime(backend="inductor")
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, str(broken))}),
        pytest.raises(BackendError, match=r"can't compile prefill here \(.*Use backend eager"),
    ):
        model.generate(RAGGED[:1])


def test_a_folder_that_can_not_be(
    small: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small.save(tmp_path / "model.sirius")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendError, match=r"can't be kept in .*variable SIRIUS_CACHE"):
        load(path, device="cpu", backend="inductor")
