"""Products of 16-bit types where the CPU has no instructions for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from sirius_runtime.ops import products
from sirius_runtime.ops.products import emulated, product
from tests.support.operators import randn

O, C = 70, 48  # noqa: E741  (not a multiple of a block's rows)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for 16 bits, and blocks of 8 rows."""
    monkeypatch.setattr(products, "emulated", lambda dtype: dtype is not torch.float32)
    monkeypatch.setattr(products, "BLOCK", 8 * C)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_rounded_once(dtype: torch.dtype, with_bias: bool, transposed: bool) -> None:
    sizes = [(2, 5, C), (O, C), (O,)]
    x, weight, bias = (randn(*size, seed=i).to(dtype) for i, size in enumerate(sizes))
    given = weight.t().contiguous().t() if transposed else weight
    y = product(x, given, bias if with_bias else None)
    wanted = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert y.dtype is dtype
    step = torch.finfo(dtype).eps / 2
    assert torch.all((y.double() - wanted).abs() <= step * wanted.abs() * 1.01 + 1e-5)
    assert torch.equal(product(x[0, 0], given), product(x[:1, :1], given)[0, 0])


@pytest.mark.usefixtures("slow")
def test_weights_are_converted_once_where_asked_for() -> None:
    x, weight, bias = (
        randn(*size, seed=i).bfloat16() for i, size in enumerate([(3, C), (O, C), (O,)])
    )
    wanted = product(x, weight, bias)
    with products.converted_once():
        assert torch.equal(product(x, weight, bias), wanted)
        assert products._converted is not None
        assert len(products._converted) == 1
        assert torch.equal(product(x, weight.clone(), bias), wanted)
        assert len(products._converted) == 2
        assert torch.equal(product(x, weight[:8], bias[:8]), wanted[:, :8])
    assert products._converted is None


@pytest.mark.usefixtures("slow")
def test_what_is_not_emulated_is_torch_s() -> None:
    x, weight = randn(3, C, seed=0), randn(O, C, seed=1)
    assert torch.equal(product(x, weight), F.linear(x, weight))
    with pytest.raises(RuntimeError, match="same dtype"):
        product(x.bfloat16(), weight)
    with FakeTensorMode():
        y = product(
            torch.empty(3, C, dtype=torch.bfloat16), torch.empty(O, C, dtype=torch.bfloat16)
        )
    assert tuple(y.shape) == (3, O)


@pytest.mark.parametrize(
    ("flags", "bfloat16", "float16"),
    [
        ("flags\t\t: fpu avx2 avx512f", True, True),
        ("flags\t\t: fpu avx512_bf16", False, True),
        ("flags\t\t: amx_bf16 avx512_fp16", False, False),
        ("Features\t: fp asimd", False, False),  # of an ARM CPU: nothing is known
    ],
)
def test_what_the_cpu_says(
    flags: str, bfloat16: bool, float16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: f"model\t: 1\n{flags}\n")
    emulated.cache_clear()
    assert emulated(torch.bfloat16) is bfloat16
    assert emulated(torch.float16) is float16
    assert not emulated(torch.float32)
    emulated.cache_clear()
