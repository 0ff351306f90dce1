"""When an operator on CUDA takes the Triton kernels, and when and how it says that it doesn't."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sirius_runtime import operators
from sirius_runtime.kernels.cuda import available
from sirius_runtime.kernels.native import VARIABLE, KernelWarning, references

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As at the first call of a process, on an H100 that isn't here."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", fake_triton(lambda: None))
    available._usable.cache_clear()
    yield
    available._usable.cache_clear()


def fake_triton(get_current_target: Any) -> Any:
    active = types.SimpleNamespace(get_current_target=get_current_target)
    driver = types.SimpleNamespace(active=active)
    return types.SimpleNamespace(runtime=types.SimpleNamespace(driver=driver))


def usable() -> bool:
    return available._usable(DEVICE)


def test_it_is_used_where_it_starts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usable()


@pytest.mark.parametrize("wish", ["avx2", ""])
def test_a_wish_for_the_cpu_s_kernels_is_none_for_cuda_s(
    monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    monkeypatch.setenv(VARIABLE, wish)
    assert usable()


def test_the_references_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not usable()


def test_within_references_nothing_launches() -> None:
    with references():
        assert available.launchers("mlp", DEVICE) is None


def broken_triton() -> None:
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (
            lambda patch: patch.setitem(sys.modules, "triton", None),
            r"Triton can't be imported.*pip install triton",
        ),
        (
            lambda patch: patch.setitem(sys.modules, "triton", fake_triton(broken_triton)),
            r"Triton can't start \(Failed to find C compiler\)",
        ),
        (
            lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5)),
            r"compute capability 8\.0, and cuda:0 has 7\.5",
        ),
        (lambda patch: patch.setattr(torch.version, "hip", "6.4"), r"built for AMD GPUs"),
    ],
    ids=["missing", "broken", "old", "amd"],
)
def test_one_warning_says_why_there_are_none(
    monkeypatch: pytest.MonkeyPatch, break_it: Any, reason: str
) -> None:
    break_it(monkeypatch)
    with pytest.warns(KernelWarning, match=rf"{reason}.*SIRIUS_KERNELS=0") as caught:
        found = [available.launchers(name, DEVICE) for name in ("mlp", "linear", "mlp")]
    assert found == [None] * 3
    assert len(caught) == 1


def operator(name: str) -> Any:
    return operators.OPERATORS[name].on_cuda


def test_every_kernel_of_the_cpu_has_one_on_cuda() -> None:
    rows = operators.OPERATORS.values()
    names = {row.name for row in rows if row.cuda}
    mixtures = {"dense_moe", "topk_moe", "experts_moe"}  # the references', on CUDA
    nested = {"embedding"}  # of nested weights, which CUDA does not take yet
    assert names | mixtures | nested == {row.name for row in rows if row.cpu}
    assert not (mixtures | nested) & names
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sirius::{name}", "CUDA")


def test_an_operator_takes_the_kernel_or_else_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: list[Any] = [torch.ones(1), None]
    module = types.SimpleNamespace(linear=lambda *_: served.pop(0))
    monkeypatch.setattr(operators, "launchers", lambda *_: module)
    x, weight = torch.ones(1, 2), torch.ones(3, 2)
    assert operator("linear")(x, weight).tolist() == [1]  # the kernel's
    assert operator("linear")(x, weight).tolist() == [[2, 2, 2]]  # it did not serve
    monkeypatch.setattr(operators, "launchers", lambda *_: None)
    assert operator("linear")(x, weight, None).tolist() == [[2, 2, 2]]
