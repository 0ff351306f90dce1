"""The CUDA kernels on a GPU, as the dispatcher calls them: skipped where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_runtime import operators
from tests.support.operators import LAYER, TREE, Block, randn, sirius

if not torch.cuda.is_available():
    pytest.skip("no CUDA device is here", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
B, C, I, O = 2, 136, 1100, 200  # noqa: E741


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No warning that they can't be used, and no call that they leave to the reference."""

    launchers = operators.launchers

    class Serving:
        def __init__(self, module: str, device: torch.device) -> None:
            self._module = launchers(module, device)

        def __getattr__(self, name: str) -> Callable[..., Any]:
            return serving(getattr(self._module, name))

        def keeping(self, *names: str) -> Callable[..., Any]:
            return serving(self._module.keeping(*names))

    def serving(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            done = kernel(*args)
            assert done is not None, "the call was left to the reference"
            return done

        return call

    monkeypatch.setattr(operators, "launchers", Serving)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def on_gpu(value: Any) -> Any:
    if isinstance(value, list):
        return [on_gpu(element) for element in value]
    return value.cuda() if isinstance(value, Tensor) else value


def near(actual: Any, expected: Any) -> None:
    if isinstance(expected, tuple | list):
        for one, other in zip(actual, expected, strict=True):
            near(one, other)
        return
    tolerance = 0 if expected.dtype is torch.int64 else TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance)


def calls(dtype: torch.dtype, tokens: int) -> list[tuple[str, list[Any]]]:
    """Operators and arguments; products of gate are exact, so that all choose the same."""
    x = (randn(B, tokens, C, seed=0) * 4).round().to(dtype) / 4
    gate = (randn(I, C, seed=1) * 2).round().to(dtype) / 16
    up, down = ((randn(I, C, seed=i) / C**0.5).to(dtype) for i in (2, 3))
    gated = [x, gate, up, down, None, None, None, "silu", 1]
    biases = [randn(n, seed=4 + i, dtype=dtype) for i, n in enumerate((I, C))]
    plain = [x, gate, None, down, biases[0], None, biases[1], "gelu_tanh", 1]
    neurons = randn(2, B, I, seed=9).argsort(-1)[..., :431]
    weight, bias = randn(O, C, seed=6, dtype=dtype), randn(O, seed=7, dtype=dtype)
    by_inputs = weight.t().contiguous()
    return [
        ("linear", [x, weight, bias]),
        ("linear", [x, by_inputs.t(), None]),
        ("linears", [x, [weight, weight[:37], gate], [bias, None, None]]),
        ("sparse_linear", [x, by_inputs, None, 0.7]),
        ("sparse_linear", [x, by_inputs, bias, 100.0]),
        ("dense_mlp", gated),
        ("dense_mlp", plain),
        ("dense_mlp_activity", gated),
        ("cats_mlp", [*gated, 0.3]),
        ("cats_mlp", [*gated, 100.0]),
        ("griffin_mlp", [*gated, neurons]),
        ("griffin_mlp", [*plain, neurons]),
        ("griffin_cats_mlp", [*gated, neurons, 0.3]),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_operators(dtype: torch.dtype, tokens: int) -> None:
    for name, args in calls(dtype, tokens):
        expected = operators.OPERATORS[name].reference(*args)
        on_device = [on_gpu(arg) for arg in args]
        first = getattr(sirius, name)(*on_device)
        near(first, expected)
        for again in (getattr(sirius, name)(*on_device) for _ in range(3)):  # to the bit
            near_bits(again, first)


def near_bits(actual: Any, expected: Any) -> None:
    several = isinstance(expected, tuple | list)
    pairs = zip(actual, expected, strict=True) if several else [(actual, expected)]
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk(dtype: torch.dtype) -> None:
    """Scores are a shuffle of 1 … 200: which are the largest is no matter of rounding."""
    x, gate = torch.zeros(B, 3, C, dtype=dtype), torch.zeros(200, C, dtype=dtype)
    x[:, 0, 0] = 1
    gate[:, 0] = randn(200, seed=5).argsort() + 1
    args = [x, gate, randn(200, C, seed=2, dtype=dtype) / 8, randn(200, C, seed=3, dtype=dtype) / 8]
    args += [None, None, None, "relu", 0, 77]
    expected = operators.OPERATORS["topk_mlp"].reference(*args)
    actual = sirius.topk_mlp(*map(on_gpu, args))
    torch.testing.assert_close(
        actual.cpu().float() / 200, expected.float() / 200, rtol=0.03, atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, 0.7)])
def test_attention(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    block = Block([3, 0, 11], [TREE], dtype, sinks=True)
    expected = block.expected(window, softcap)
    for name, value in vars(block).items():
        setattr(block, name, on_gpu(value))
    apart, k_new, _ = sirius.block_attention(*map(on_gpu, block.apart(range(7), window, softcap)))
    near(apart, expected)
    near(k_new, block.k.cpu())
    near(block.run(window, softcap), expected)
    for row, length in enumerate(block.lengths):
        assert torch.equal(block.k_cache[LAYER, row, :, length : length + 7], block.k[row])


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def test_a_captured_call_follows_its_inputs() -> None:
    """How many neurons are live is known to the device alone."""
    for name, args in calls(torch.bfloat16, 1):
        on_device = [on_gpu(arg) for arg in args]
        operator = getattr(sirius, name)
        graph, out = captured(lambda operator=operator, given=on_device: operator(*given))
        for scale in (0.0, 0.5, 2.0):
            on_device[0].copy_(args[0] * scale)
            graph.replay()
            torch.cuda.synchronize()
            near_bits(out, operator(*on_device))
