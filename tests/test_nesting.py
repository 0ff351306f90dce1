"""The kernel that nests weights equals torch bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sirius_passes import stored_form as stored
from sirius_passes.stored_form import stored_form
from sirius_runtime import nested
from sirius_runtime.errors import OperandError
from sirius_runtime.kernels.build import InstructionSet
from sirius_runtime.kernels.native import references, using
from sirius_runtime.kernels.nesting import nest
from sirius_runtime.nested import GROUP, Layout, nested_shape
from sirius_runtime.spec import WeightSpec
from tests.support.kernels import SETS, require

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
O, C = 224, 608  # noqa: E741  (of 16 rows a task, and of 32 inputs)


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    require(request.param)
    with using(request.param):
        yield request.param


def numbers(dtype: torch.dtype) -> Tensor:
    """A matrix [O, C] with every kind of scale: zero, subnormal, ties, the largest."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-9, 4, O, dtype=torch.float64)[:, None]
    matrix = (torch.randn(O, C, generator=generator, dtype=torch.float64) * size).to(dtype)
    matrix[3] = 0
    matrix[5, :GROUP] = torch.arange(GROUP) - 15.5  # halves: to even
    matrix[5, 0] = 127
    matrix[7, 1::2] = 0
    if dtype is not torch.float16:
        matrix[9, 0] = 8.05e6  # of the largest scale
    return matrix


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("dtype", DTYPES)
def test_to_the_bit(
    isa: InstructionSet, dtype: torch.dtype, layout: Layout, transposed: bool
) -> None:
    matrix = numbers(dtype)
    given = matrix.t().contiguous().t() if transposed else matrix
    done = nest(given, layout)
    assert done is not None
    assert torch.equal(done.planes, nested.nest(matrix, layout))
    assert done.largest == float(matrix.abs().max())
    as_q8_0 = nest(given, layout, as_q8_0=True)
    assert as_q8_0 is not None
    groups = matrix.float().unflatten(-1, (-1, GROUP))
    own = nested.in_integers(groups, groups.abs().amax(-1) / nested.LARGEST)
    assert torch.equal(as_q8_0.planes, nested.nest_integers(*own, layout))
    part = nest(given[32:96], layout)  # its rows are further apart than they are long
    assert part is not None
    assert torch.equal(part.planes, nested.nest(matrix[32:96], layout))


def test_groups_that_were_rounded_are_counted() -> None:
    require(InstructionSet.PORTABLE)
    whole = torch.randint(-126, 127, (O, C), generator=torch.Generator().manual_seed(1)).float()
    whole[:, ::GROUP] = 127
    for layout in Layout:
        exact = nest(whole / 8, layout, as_q8_0=True)
        assert exact is not None
        assert exact.rounded == 0
        whole[17, 40] += 0.25
        other = nest(whole / 8, layout, as_q8_0=True)
        assert other is not None
        assert other.rounded == 1
        whole[17, 40] -= 0.25


@pytest.mark.parametrize("largest", [127, 100])
@pytest.mark.parametrize("layout", Layout)
def test_a_stored_weight_is_the_same_without_kernels(layout: Layout, largest: int) -> None:
    """Also for dequantized integers, which torch recovers if no integer of a group is 127."""
    require(InstructionSet.PORTABLE)
    q = torch.randint(-99, 100, (O, C // GROUP, GROUP), generator=torch.Generator().manual_seed(1))
    q[..., 0] = largest
    values = (q * torch.rand(O, C // GROUP, 1).half().float()).flatten(1)
    shape = nested_shape(O, C, layout)
    spec = WeightSpec("w", "uint8", shape, layout is Layout.BY_INPUTS, retype=False, nested=layout)
    for matrix in (values, values.bfloat16(), numbers(torch.float32)):
        with_kernels = stored_form(spec, matrix)
        with references():
            assert torch.equal(stored_form(spec, matrix), with_kernels)
    assert torch.equal(nested.unnest(stored_form(spec, values)), values)


def test_a_large_weight_is_nested_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    require(InstructionSet.PORTABLE)
    monkeypatch.setattr(stored, "_in_blocks", None)
    spec = WeightSpec("w", "uint8", nested_shape(O, C, Layout.BY_OUTPUTS), nested=Layout.BY_OUTPUTS)
    assert torch.equal(
        stored_form(spec, numbers(torch.bfloat16)),
        nested.nest(numbers(torch.bfloat16), Layout.BY_OUTPUTS),
    )


def test_other_sizes_are_refused() -> None:
    require(InstructionSet.PORTABLE)
    with pytest.raises(OperandError, match="matrix has 33 outputs and 64 inputs"):
        nest(torch.zeros(33, 64), Layout.BY_INPUTS)
    with pytest.raises(OperandError, match="matrix has 32 outputs and 48 inputs"):
        nest(torch.zeros(32, 48), Layout.BY_OUTPUTS)
    assert nest(torch.zeros(32, 64, dtype=torch.float64), Layout.BY_OUTPUTS) is None
    with references():
        assert nest(torch.zeros(32, 64), Layout.BY_OUTPUTS) is None
