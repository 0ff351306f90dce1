"""The benchmark of the CUDA kernels, as far as it goes without a GPU: its calls and its table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.triton_interpreter import interpreting, require_triton

require_triton()

from benchmarks import checked, gpu_kernels  # noqa: E402  (they import Triton)
from sirius_compile.operator_check import relative_error  # noqa: E402
from sirius_runtime.kernels.cuda import attention, linear, mlp  # noqa: E402

TINY = gpu_kernels.Shape("tiny", 32, 80, 4, 2, 16, 50, contexts=(70,))
CPU = torch.device("cpu")
MODULES = {"attention": attention, "linear": linear, "mlp": mlp}


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    with interpreting():
        yield


@pytest.mark.slow
def test_its_calls_are_served_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "launchers", lambda name, _: MODULES[name])
    monkeypatch.setattr(gpu_kernels, "ROTATED", 1)
    monkeypatch.setattr(gpu_kernels, "SKIPPED", (0.5,))
    torch.manual_seed(
        1
    )  # with 0, topk's last two scores are equal in bfloat16, and either is right
    pool = gpu_kernels.Pool(torch.bfloat16, CPU, 1 << 20, 1)
    pool.buffer *= 20  # gates that differ, at so few channels
    ran: dict[str, set[int]] = {}
    for case in gpu_kernels.cases(pool, TINY):
        kernel = case.kernel(CPU)
        done = kernel(*case.sets[0])
        assert gpu_kernels.right(case, TINY, case.sets[0], done) < 0.02, case.name
        if case.module != "attention":
            assert len({flattened(args[1])[0].data_ptr() for args in case.sets}) > 1
        ran.setdefault(case.operator, set()).add(case.tokens)

        baseline, sets = case.baseline(CPU)
        dense = baseline(*sets[0])
        # What an operator returns besides its result are counts and the like.
        for one, other in zip(flattened(dense), flattened(done), strict=False):
            assert one.shape == other.shape
        skips = case.operator not in ("linear", "linears", "dense_mlp", "cached_attention")
        if not skips:
            pairs = zip(flattened(done), flattened(dense), strict=True)
            assert all(relative_error(a, b) < 0.02 for a, b in pairs), case.name
        read = case.bytes(done)
        assert read == int(read) > 0
        if case.operator == "dense_mlp":
            assert read == 3 * 80 * 32 * 2
        if case.operator == "cats_mlp":
            assert read == (80 + 2 * done[1].item()) * 32 * 2
    of_one = {"topk_mlp", "griffin_cats_mlp", "sparse_linear"}
    of_several = {"linear", "linears", "dense_mlp", "griffin_mlp", "cats_mlp"}
    of_several |= {"cached_attention", "block_attention"}
    assert ran == {name: {1} if name in of_one else {1, 8} for name in of_one | of_several}


def flattened(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, tuple | list) else [value]


NESTED_TINY = gpu_kernels.Shape("tiny", 64, 96, 4, 2, 16, 64)


def nested_cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[gpu_kernels.Case]:
    monkeypatch.setattr(gpu_kernels, "launchers", lambda name, _: MODULES[name])
    torch.manual_seed(0)
    pool = gpu_kernels.Pool(torch.bfloat16, CPU, 1 << 20, 1)
    pool.buffer *= 20
    return gpu_kernels.nested_cases(pool, NESTED_TINY)


@pytest.mark.slow
def test_nested_calls_are_served_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so are their baselines, the same operators over the same numbers in bfloat16."""
    ran: dict[str, set[tuple[int, str]]] = {}
    for case in nested_cases(monkeypatch):
        planes = case.name.rpartition(", ")[2]
        done = case.kernel(CPU)(*case.sets[0])
        assert gpu_kernels.right(case, NESTED_TINY, case.sets[0], done) < 0.02, case.name
        assert all(weight.dtype is torch.uint8 for weight in flattened(case.sets[0][1]))
        baseline, sets = case.baseline(CPU)
        assert len(sets) == len(case.sets) > 1
        assert all(weight.dtype is torch.bfloat16 for weight in flattened(sets[0][1]))
        for one, other in zip(flattened(done), flattened(baseline(*sets[0])), strict=True):
            assert one.shape == other.shape
            # The high plane is another matrix; a skipped call's score may be rounded at the border.
            if planes == "both planes" and "skipped" not in case.name:
                assert relative_error(one, other) < 0.03, case.name
        assert case.bytes(done) > 0
        if case.operator == "dense_mlp":
            assert case.bytes(done) * 8 == 3 * 96 * 64 * (8.5 if planes == "both planes" else 4.25)
        ran.setdefault(case.operator, set()).add((case.tokens, planes))
    of_one = {"topk_mlp", "griffin_cats_mlp", "sparse_linear"}
    of_several = {"linears", "dense_mlp", "griffin_mlp", "cats_mlp"}
    assert ran == {
        name: {
            (n, planes)
            for planes in gpu_kernels.PLANES
            for n in ((1,) if name in of_one else (1, 8))
        }
        for name in of_one | of_several
    }


def test_a_wrong_nested_result_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a scale that is an eighth too large."""
    case = next(c for c in nested_cases(monkeypatch) if c.operator == "linears")
    x, (weight,), biases = case.sets[0]
    other = weight.clone()
    other[0, :, NESTED_TINY.hidden // 2 :] += 1
    (done,) = case.kernel(CPU)(x, [other], biases)
    with pytest.raises(
        checked.WrongResultError, match=r"tiny, linears q, o .*, both planes, 1 tok"
    ):
        gpu_kernels.right(case, NESTED_TINY, case.sets[0], (done,))


def test_a_kernel_that_does_not_serve_is_no_row() -> None:
    with pytest.raises(RuntimeError, match="linear does not support"):
        gpu_kernels.served(linear.linear)(torch.ones(1, 2).double(), torch.ones(3, 2))


def test_its_table() -> None:
    row = gpu_kernels.Row(
        *("8B", "dense_mlp", 1, 352.3, 120.0, (119.0, 121.5), 2936.0, 0.9),
        *(140.0, (139.0, 142.0), 3e-3),
    )
    assert len(row.cells()) == len(gpu_kernels.header("torch"))
    assert gpu_kernels.line(row.cells()) == (
        "| 8B | dense_mlp | 1 | 352.3 | 120.0 (119.0-121.5) | 2936 | 90% "
        "| 140.0 (139.0-142.0) | 1.17 | 3.0e-03 |"
    )


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_kernels"])
    with pytest.raises(SystemExit) as stopped:
        gpu_kernels.main()
    assert stopped.value.code == 1
    assert "need a CUDA device" in capsys.readouterr().err


def test_a_wrong_result_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "launchers", lambda name, _: MODULES[name])
    pool = gpu_kernels.Pool(torch.bfloat16, CPU, 1 << 20, 1)
    case = next(gpu_kernels.linear_cases(pool, TINY, 1))
    done = case.reference()(*case.sets[0]).clone()
    assert gpu_kernels.right(case, TINY, case.sets[0], done) == 0
    done[..., -8:] = 0
    with pytest.raises(
        checked.WrongResultError, match=r"tiny, linear q, o .*, 1 tokens: relative err"
    ):
        gpu_kernels.right(case, TINY, case.sets[0], done)
