"""Benchmarks print no number of a wrong kernel: they end, and name the row and its error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import checked, context, kernels, periods, steps
from sirius_runtime.backends import rewrite
from sirius_runtime.kernels import linear, mlp, native
from tests.support.fast import slow_but
from tests.support.kernels import require_compiler

SMALL = ("--shape", "tiny", "--context", "16", "--rounds", "2")


@pytest.fixture(autouse=True)
def _compiler() -> None:
    require_compiler()


def broken(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, but for its last columns; its reference stays right."""

    @functools.wraps(kernel)
    def wrong(*args: Any, **options: Any) -> Any:
        result = kernel(*args, **options)
        if not native.switched_off() and result is not None:
            first = result[0] if isinstance(result, tuple) else result
            first[..., -32:] *= 1.5
        return result

    return wrong


def break_in_graphs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    own = dict(rewrite._functions())
    changed = {k: broken(v) if v.__name__ == name else v for k, v in own.items()}
    monkeypatch.setattr(rewrite, "_functions", lambda: changed)


@pytest.mark.parametrize(
    "only", slow_but([[], ["--only", "transposed"]], (), [["--only", "transposed"]])
)
def test_a_wrong_kernel_has_no_row(
    only: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "HIDDEN", 64)
    monkeypatch.setattr(kernels, "NEURONS", 192)
    monkeypatch.setattr(kernels, "VOCABULARY", 512)
    monkeypatch.setattr(kernels, "POOL", 1 << 22)
    monkeypatch.setattr(kernels, "READ", 1 << 20)
    flags = ["--rounds", "1", "--tokens", "1", "--context", "64", *only]
    kernels.main(flags)
    assert "| linear of a transposed weight [64, 192] | 1 |" in capsys.readouterr().out
    monkeypatch.setattr(linear, "_by_inputs", broken(linear._by_inputs))
    with pytest.raises(checked.WrongResultError) as ended:
        kernels.main(flags)
    said = str(ended.value)
    assert "linear of a transposed weight [64, 192], 1 tokens: relative error" in said
    assert "at most 3.1e-02 is allowed" in said
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_wrong_step_has_no_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_in_graphs(monkeypatch, "topk_mlp")
    flags = ["--skipped", "0.5", "--verify", "4", "--methods", "topk"]
    with pytest.raises(
        checked.WrongResultError, match=r"topk, 50% skipped, topk_mlp \(\w+\): relative error"
    ):
        steps.main([*SMALL, *flags, "--threads", str(torch.get_num_threads())])
    assert capsys.readouterr().out == ""


@pytest.mark.gate
def test_a_wrong_period_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    break_in_graphs(monkeypatch, "griffin_mlp")
    with pytest.raises(
        checked.WrongResultError, match=r"k 4, w 1, griffin_mlp \(\w+\): relative error"
    ):
        periods.main([*SMALL, "--period", "4", "--width", "1"])


@pytest.mark.slow
def test_a_wrong_graph_of_a_period_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--context", "64", "--layers", "1", "--repeats", "2", "--period", "4", "--width", "1"]
    context.main(flags)
    break_in_graphs(monkeypatch, "block_attention")
    monkeypatch.setattr(
        "sirius_runtime.kernels.reinplace.block_attention_",
        broken(rewrite.write_in_place.__globals__["block_attention_"]),
    )
    with pytest.raises(checked.WrongResultError, match=r"k 4, w 1"):
        context.main(flags)


@pytest.mark.slow
def test_an_answer_is_followed_operator_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from sirius_compile import CompileConfig, compile_model

    model = compile_model("tally-3m", CompileConfig(sparsity="topk", period=4)).to_runtime()
    prompt = list(range(8))
    checked.generation("sound", model, prompt)
    monkeypatch.setattr(mlp, "_run", broken(mlp._run))
    with pytest.raises(checked.WrongResultError, match=r"wrong, so not timed: answer, \w+_mlp"):
        checked.generation("answer", model, prompt)


def test_tokens_are_counted() -> None:
    checked.equal("row", [1, 2], (1, 2))
    with pytest.raises(
        checked.WrongResultError, match="row: 1 of 3 tokens are the reference's, all must be"
    ):
        checked.equal("row", [1, 3], [1, 2, 4])


def test_layers_add_errors() -> None:
    wanted = torch.ones(1, 8)
    allowed = checked.tolerance(torch.float32)
    checked.near("row", wanted * (1 + 3 * allowed), wanted, layers=8)
    with pytest.raises(checked.WrongResultError, match="relative error"):
        checked.near("row", wanted * (1 + 3 * allowed), wanted)
