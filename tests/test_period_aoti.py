"""Backend `aoti`: the period compiled to machine code does what periods by the entries do.

A build takes a minute: one test that makes one is fast enough for each run, and holds all that one
build can show.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sirius_compile import CompileConfig, compile_model
from sirius_runtime import load
from sirius_runtime.errors import BackendError, ConfigError, GenerationError
from sirius_runtime.kernels.native import kernels
from sirius_runtime.model import GenerationOutput, SiriusModel
from tests.support.counts import counted_alike
from tests.support.fast import slow_but
from tests.support.models import (
    Rows,
    bound_weights,
    random_decoder,
    word_tokenizer,
    write_calibration,
)

RAGGED = [[7, 8, 9], [50, 30, 11, 22, 60], [4 * i + 7 for i in range(15)]]
NEW, CONTEXT = 24, 64


@dataclass(frozen=True)
class Artifact:
    """A compiled model's file, and what its first load would say."""

    path: Path
    eager: SiriusModel

    def load(self, rows: int = 3, context: int | None = CONTEXT) -> tuple[SiriusModel, list[str]]:
        """The model behind back end `aoti`, and what its progress was told."""
        told: list[str] = []
        model = load(
            self.path,
            device="cpu",
            backend="aoti",
            rows=rows,
            context=context,
            progress=told.append,
        )
        return model, told

    def agree(self, model: SiriusModel, prompts: Rows, **options: Any) -> GenerationOutput:
        """What both back ends generate, which is the same."""
        options = {"max_new_tokens": NEW, "eos_token_id": []} | options
        wanted = self.eager.generate(prompts, **options)
        found = model.generate(prompts, **options)
        assert found.tokens == wanted.tokens
        assert found.finish_reasons == wanted.finish_reasons
        names = "advances density effective_density acceptance_rate"
        for name in counted_alike(names, options["eos_token_id"]):
            assert getattr(found.stats, name) == getattr(wanted.stats, name), name
        return found


Artifacts = Callable[..., Artifact]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Compiles each (method, width, size) of a model to a file, once."""
    folder = tmp_path_factory.mktemp("artifacts")
    text = write_calibration(folder / "words.txt")
    made: dict[object, Artifact] = {}

    def make(
        method: str, width: int, size: int, model_type: str = "llama", **config: object
    ) -> Artifact:
        key = (method, width, size, model_type, *config.items())
        if key not in made:
            options = CompileConfig(
                sparsity=method, period=size, tree_width=width, calibration=text
            )
            reference = random_decoder(model_type, **config)
            compiled = compile_model(reference, options, tokenizer=word_tokenizer())
            path = compiled.save(folder / f"{len(made)}.sirius")
            made[key] = Artifact(path, load(path, device="cpu"))
        return made[key]

    return make


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test alone; not there yet. The CPU kernels are built elsewhere."""
    kernels()
    folder = tmp_path / "cache" / "of sirius"
    monkeypatch.setenv("SIRIUS_CACHE", str(folder))
    return folder


@pytest.mark.slow
def test_a_compiled_period(artifacts: Artifacts, cache: Path) -> None:
    artifact = artifacts("griffin", 2, 4)
    model, told = artifact.load()
    assert len(told) == 2
    assert "period of 4 tokens, width 2, for 3 rows of 64 tokens" in told[0]
    assert str(cache) in told[0]
    (package,) = cache.iterdir()  # nothing temporary is left

    gives_the_session_s_tokens(artifact, model)
    refuses_what_it_was_not_compiled_for(artifact, model)
    shares_the_weights(model, package)

    written = package.stat().st_mtime_ns
    again, told = artifact.load()
    assert told == []
    assert list(cache.iterdir()) == [package]
    assert package.stat().st_mtime_ns == written
    artifact.agree(again, RAGGED)


def gives_the_session_s_tokens(artifact: Artifact, model: SiriusModel) -> None:
    found = {}
    for mode, options in (("sirius", {}), ("exact", {}), ("sample", {"seed": 3, "top_p": 0.9})):
        found[mode] = artifact.agree(model, RAGGED, mode=mode, **options)
        for confidence in (0.3, 1.0):
            artifact.agree(model, RAGGED, mode=mode, confidence=confidence, **options)
        often = artifact.agree(model, RAGGED, mode=mode, refresh=1, **options)
        assert often.stats.advances != found[mode].stats.advances
        artifact.agree(model, RAGGED, mode=mode, refresh=3, period=3, **options)
        for rows in (1, 2):  # the batch is filled up
            fewer = artifact.agree(model, RAGGED[:rows], mode=mode, **options)
            assert fewer.tokens == found[mode].tokens[:rows]
    assert len({output.tokens for output in found.values()}) == 3
    ends = [found["exact"].tokens[0][2], found["exact"].tokens[1][11]]
    artifact.agree(model, RAGGED, mode="exact", eos_token_id=ends)
    for mode in ("full", "sparse"):
        artifact.agree(model, RAGGED, mode=mode)


def refuses_what_it_was_not_compiled_for(artifact: Artifact, model: SiriusModel) -> None:
    refused: list[tuple[Rows, dict[str, Any], type[Exception], str]] = [
        ([*RAGGED, [7]], {}, GenerationError, "batch has 4 rows, but .* compiled for 3; split it"),
        ([[7] * CONTEXT], {}, GenerationError, r"has 64 tokens, .* 64 .*\(context\).*larger conte"),
        (
            RAGGED,
            {"max_new_tokens": CONTEXT - 14},
            GenerationError,
            r"max_new_tokens must be in 1..49 here \(context is 64 tokens, the prompt has 15",
        ),
        (RAGGED, {"period": 5}, ConfigError, "period must be in 1..4 here, got 5"),
        (RAGGED, {"tree_width": 1}, ConfigError, "tree_width must be 2 here, got 1"),
        (RAGGED, {"period": "auto"}, ConfigError, "period 'auto' .* use backend eager"),
    ]
    for prompts, options, error, message in refused:
        with pytest.raises(error, match=message):
            model.generate(prompts, **options)
        artifact.agree(model, RAGGED)
    # to the last token of the context, and past it in modes that run no periods
    artifact.agree(model, RAGGED, mode="exact", max_new_tokens=CONTEXT - 15)
    artifact.agree(model, [*RAGGED, [7]], mode="full", max_new_tokens=CONTEXT)


def shares_the_weights(model: SiriusModel, package: Path) -> None:
    """The machine code's arguments are the back end's tensors; it holds no others."""
    weights = model.backend.weights  # type: ignore[attr-defined]
    bound = bound_weights(model, "period")
    assert bound.keys() == weights.keys()
    for name, tensor in bound.items():
        assert tensor.data_ptr() == weights[name].data_ptr()
        assert tensor.data_ptr() == bound_weights(model, "full")[name].data_ptr()
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
    assert any(name.endswith(".so") for name in names)
    assert not [name for name in names if "weight" in name or "constant" in name]


CASES = [
    ("griffin", 1, 2, 3),
    ("cats", 1, 8, 1),
    ("cats", 2, 16, 4),
    ("topk", 4, 8, 2),
    ("topk", 8, 4, 3),
    ("griffin", 8, 16, 3),
    ("none", 1, 4, 2),
    ("teal", 1, 4, 2),
    ("griffin+teal", 2, 8, 3),
    ("topk", 1, 1, 3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "width", "size", "rows"), CASES)
def test_tokens_advances_and_densities(
    artifacts: Artifacts, method: str, width: int, size: int, rows: int
) -> None:
    artifact = artifacts(method, width, size)
    model, _ = artifact.load(rows)
    for prompts in (RAGGED[:1], (RAGGED * 2)[:rows]):
        for mode, options in (("sirius", {}), ("exact", {}), ("sample", {"seed": 5})):
            artifact.agree(model, prompts, mode=mode, **options)
            artifact.agree(model, prompts, mode=mode, confidence=0.3, **options)


@pytest.mark.slow
def test_windows_and_soft_caps(artifacts: Artifacts) -> None:
    artifact = artifacts("griffin", 2, 4, "gemma2", sliding_window=3)
    model, _ = artifact.load()
    for mode in ("sirius", "exact"):
        artifact.agree(model, RAGGED, mode=mode)


@pytest.mark.slow
def test_sinks_and_experts(artifacts: Artifacts) -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    artifact = artifacts("experts", 2, 4, "gpt_oss", sliding_window=3, **sizes)
    model, _ = artifact.load()
    for mode in ("sirius", "exact"):
        artifact.agree(model, RAGGED, mode=mode)


@pytest.mark.slow
def test_each_number_of_rows_and_context_is_built_for_itself(
    artifacts: Artifacts, cache: Path
) -> None:
    artifact = artifacts("topk", 1, 2)
    for count, (rows, context) in enumerate([(1, 32), (2, 32), (2, None)], start=1):
        model, told = artifact.load(rows, context)
        assert f"for {rows} rows of {context or 128} tokens" in told[0]
        assert len(list(cache.iterdir())) == count
        artifact.agree(model, RAGGED[:rows])


# builds that fail


@pytest.mark.parametrize("context", slow_but((0, 1, 129), {129}))
def test_a_context_out_of_range_is_refused(artifacts: Artifacts, context: int) -> None:
    with pytest.raises(ConfigError, match=rf"context must be in 2..128 .*, got {context}"):
        artifacts("griffin", 1, 4).load(context=context)


def test_no_rows_are_refused(artifacts: Artifacts) -> None:
    with pytest.raises(ConfigError, match="rows must be >= 1, got 0"):
        artifacts("griffin", 1, 4).load(rows=0)


def test_a_cache_folder_that_can_t_be_written_is_named(artifacts: Artifacts, cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(BackendError, match=r"can't be kept in .*of sirius.*variable SIRIUS_CACHE"):
        artifacts("griffin", 1, 4).load()


class Export:
    """Stands for what torch.export gives, where what follows is replaced too."""

    def run_decompositions(self, table: object) -> Export:
        return self


@pytest.fixture
def package_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., str]], None]:
    """Replaces AOTInductor."""

    def replace(build: Callable[..., str]) -> None:
        monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: Export())
        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", build)

    return replace


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no working C++ compiler\nand more"), r"\(no working C\+\+ compiler\); it"),
        (AssertionError(), "AssertionError"),
    ],
    ids=["with a message", "without"],
)
def test_a_build_that_fails_says_why_and_what_else_there_is(
    artifacts: Artifacts,
    cache: Path,
    package_by: Callable[[Callable[..., str]], None],
    error: Exception,
    reason: str,
) -> None:
    def build(program: object, *, package_path: str) -> str:
        Path(package_path).write_bytes(b"half of a package")
        raise error

    package_by(build)
    for _ in range(2):  # nothing is left of the first that the second could take for whole
        with pytest.raises(BackendError, match=rf"can't compile .*{reason}") as caught:
            artifacts("griffin", 1, 4).load()
        assert "Use backend period or eager" in str(caught.value)
        assert caught.value.__cause__ is error
        assert list(cache.iterdir()) == []


def test_a_package_that_can_t_be_loaded_is_named(
    artifacts: Artifacts, cache: Path, package_by: Callable[[Callable[..., str]], None]
) -> None:
    def build(program: object, *, package_path: str) -> str:
        Path(package_path).write_bytes(b"not a package")
        return package_path

    package_by(build)
    with pytest.raises(BackendError, match=r"of sirius/\w+\.pt2"):
        artifacts("griffin", 1, 4).load()
