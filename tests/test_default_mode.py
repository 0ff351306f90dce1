"""The mode of runs that name none, which the artifact has: everywhere the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sirius_compile import CompileConfig, compile_model
from sirius_runtime import load
from sirius_runtime.errors import ConfigError
from sirius_runtime.evaluation.modes import default_settings
from sirius_runtime.model import SiriusModel
from sirius_runtime.serve.engine import Capacity
from sirius_runtime.serve.server import make_served
from tests.support.cli import Cli
from tests.support.models import random_decoder, word_tokenizer

PROMPT = "w7 w8 w9"
OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "period": 6}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose default is exact, although its threshold would accept every draft."""
    options = CompileConfig(
        sparsity="topk", keep=0.3, graphs="entries", mode="exact", threshold=0.0
    )
    compiled = compile_model(random_decoder("llama"), options, tokenizer=word_tokenizer())
    return compiled.save(tmp_path_factory.mktemp("mode") / "model.sirius")


@pytest.fixture(scope="module")
def model(path: Path) -> SiriusModel:
    return load(path)


def test_generate_takes_it_from_the_artifact(model: SiriusModel) -> None:
    own, exact, sirius, full = (
        model.generate(PROMPT, **(OPTIONS if mode != "full" else {"max_new_tokens": 24}), mode=mode)
        for mode in (None, "exact", "sirius", "full")
    )
    assert own.tokens == exact.tokens == full.tokens != sirius.tokens
    assert own.stats.advances == exact.stats.advances != sirius.stats.advances


def test_commands_take_it_from_the_artifact(cli: Cli, path: Path, model: SiriusModel) -> None:
    exact = model.generate(PROMPT, **OPTIONS, mode="exact").tokens[0]
    flags = ("-p", PROMPT, "--max-new-tokens", 24, "--period", 6, "--json", "--backend", "eager")
    done = cli.run("run", path, *flags)
    assert json.loads(done.out)["tokens"] == list(exact), done.err
    assert "mode       exact" in cli.run("inspect", path).out
    assert [s.name for s in default_settings(model.program.period.mode)] == [
        *("full", "sparse", "exact")
    ]
    served = make_served(model, "m", Capacity(rows=1, context=64))
    try:
        assert served.defaults.mode == "exact"
    finally:
        served.engine.stop()


def test_the_compiler_refuses_what_can_not_be_a_default(cli: Cli, tmp_path: Path) -> None:
    for mode in ("sample", "full", "sparse", "quick", ""):
        with pytest.raises(ConfigError, match=r"--mode must be one of sirius, exact"):
            CompileConfig(mode=mode)
    done = cli.compile("tally-3m", "--out", tmp_path / "m.sirius", "--mode", "sample")
    assert done.code == 2
    assert "--mode must be one of sirius, exact" in done.err
