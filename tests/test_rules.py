"""A rule is a function and a line: the one of docs/ADD_A_RULE.md, on every back end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sirius_compile import CompileConfig, compile_model
from sirius_runtime import load
from sirius_runtime.cli import main as sirius
from sirius_runtime.rules import RULES
from tests.support.models import random_decoder, word_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "ADD_A_RULE.md"
ROWS = [[7, 8, 9], [50, 30, 11, 22, 60]]
RUN: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": []}
CONFIG = CompileConfig(sparsity="topk", period=4, graphs="both")


@pytest.fixture
def ratio() -> Iterator[None]:
    """The page's rule, until the test ends."""
    before = dict(RULES)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code, {})
    yield
    RULES.clear()
    RULES.update(before)


def compiled(path: Path) -> Path:
    """Of the rules that there are now."""
    return compile_model(random_decoder("llama"), CONFIG, tokenizer=word_tokenizer()).save(path)


def test_every_back_end_runs_the_page_s_rule(ratio: None, tmp_path: Path) -> None:
    path = compiled(tmp_path / "model.sirius")
    eager, whole, onnx = (load(path, device=d, backend=b) for d, b in BACKENDS)
    lenient, strict = (eager.generate(ROWS, mode="ratio", threshold=r, **RUN) for r in (1e-3, 1.0))
    assert strict.tokens == eager.generate(ROWS, mode="exact", **RUN).tokens
    assert (lenient.stats.aal or 0) > (strict.stats.aal or 0)
    for threshold, wanted in ((1e-3, lenient), (1.0, strict)):
        for model in (whole, onnx):
            found = model.generate(ROWS, mode="ratio", threshold=threshold, **RUN)
            assert found.tokens == wanted.tokens
            assert found.stats.advances == wanted.stats.advances
        for mode in ("sirius", "exact"):  # which the graph knows as before
            pair = [m.generate(ROWS, mode=mode, **RUN).tokens for m in (eager, whole)]
            assert pair[0] == pair[1]


BACKENDS = ((None, "eager"), (None, "period"), (None, "onnxruntime"))


@pytest.mark.slow
def test_an_artifact_of_before_runs_it_by_its_entries(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = compiled(tmp_path / "model.sirius")
    assert "ratio" not in load(path).program.period.rules
    request.getfixturevalue("ratio")
    eager, whole, onnx = (load(path, device=d, backend=b) for d, b in BACKENDS)
    wanted = eager.generate(ROWS, mode="ratio", **RUN)
    for model in (whole, onnx):
        assert model.generate(ROWS, mode="ratio", **RUN).tokens == wanted.tokens
    command = ["run", str(path), "-p", "w7 w8", "--mode", "ratio", "--max-new-tokens", "4"]
    assert sirius(command) == 0
    assert sirius(["run", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sirius (default), exact, sample, ratio, full or sparse" in shown
