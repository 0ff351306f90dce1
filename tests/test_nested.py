"""Nested weights as bytes, beside loops over their numbers; what a draft makes of half of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sirius_passes.stored_form import checkpoint_shape, integers_of, stored_form
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.nested import (
    GROUP,
    LARGEST_SCALE,
    Layout,
    draft_scales,
    in_integers,
    in_steps,
    integers,
    is_nested,
    matrix_shape,
    nest,
    nest_integers,
    nested_shape,
    product,
    unnest,
    why_not,
)
from sirius_runtime.spec import WeightSpec

Q = tuple[Tensor, Tensor]
layouts = st.sampled_from(list(Layout))


@st.composite
def weights(draw: st.DrawFn) -> Q:
    """Integers [O, C] of all of int8, and scales [O, C / 32], some of them zero or subnormal."""
    outputs, groups = 32 * draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 16, 19, 33]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    q = torch.randint(-128, 128, (outputs, groups * GROUP), generator=generator)
    bits = torch.randint(0, 0x7C00, (outputs, groups), generator=generator)  # all finite ones
    bits[0] = draw(st.sampled_from([0, 1, 0x3FF, 0x400, 0x7BFF]))
    return q.to(torch.int8), bits.to(torch.int16).view(torch.float16)


# bytes


def nibble_and_scale(planes: Tensor, o: int, c: int) -> tuple[list[int], list[int]]:
    """Of each plane, by the words of the format's description."""
    group, place = divmod(c, GROUP)
    nibbles, scales = [], []
    for plane in planes:
        if planes.ndim == 3:
            inputs = plane.shape[1] // 17 * 32
            block = group // 16 * 16  # of groups whose words are side by side
            abreast = min(16, inputs // 32 - block)
            word, own = divmod(place % 16, 4)
            byte = int(plane[o, block * 16 + (word * abreast + group - block) * 4 + own])
            nibbles.append(byte >> 4 if place >= 16 else byte & 15)
            scales.append(int(plane[o, inputs // 2 + group]))
        else:
            block, own = divmod(o, 32)
            byte = int(plane[group, place, block * 16 + own % 16])
            nibbles.append(byte >> 4 if own >= 16 else byte & 15)
            scales.append(int(plane[group, 32 + own // 16, block * 16 + own % 16]))
    return nibbles, scales


@given(weights(), layouts, st.data())
def test_a_number_is_where_the_format_says(own: Q, layout: Layout, data: st.DataObject) -> None:
    q, scale = own
    planes = nest_integers(q, scale, layout)
    o = data.draw(st.integers(0, q.shape[0] - 1))
    c = data.draw(st.integers(0, q.shape[1] - 1))
    (high, low), (upper, lower) = nibble_and_scale(planes, o, c)
    assert 16 * high + low == int(q[o, c]) + 128
    bits = int(scale.view(torch.int16)[o, c // GROUP])
    assert upper * 256 + lower == bits * 2


@given(weights(), layouts)
def test_both_planes_give_back_integers_and_scales(own: Q, layout: Layout) -> None:
    q, scale = own
    planes = nest_integers(q, scale, layout)
    assert is_nested(planes)
    assert tuple(planes.shape) == nested_shape(q.shape[0], q.shape[1], layout)
    assert matrix_shape(tuple(planes.shape)) == tuple(q.shape)
    found, scales = integers(planes)
    assert torch.equal(found, q.to(torch.int16))
    assert torch.equal(scales, scale.float())


@given(weights(), layouts)
def test_a_draft_is_off_by_half_of_what_a_nibble_stands_for_at_most(own: Q, layout: Layout) -> None:
    q, scale = own
    planes = nest_integers(q, scale, layout)
    high, near = integers(planes[:1])
    assert int((high - q).abs().max()) <= 8
    normal = scale >= torch.finfo(torch.float16).smallest_normal
    step = scale.float()
    assert torch.all(((near - step).abs() <= step / 16)[normal])
    wanted = high.unflatten(-1, (-1, GROUP)) * near.unsqueeze(-1)
    assert torch.equal(unnest(planes[:1]), wanted.flatten(-2))
    # Of every value of a nibble, the mean error is half a step: it has no sign of its own.
    every = torch.arange(-128, 128).to(torch.int8).reshape(8, 32)
    all_planes = nest_integers(every, torch.ones(8, 1, dtype=torch.float16), Layout.BY_OUTPUTS)
    assert float((integers(all_planes[:1])[0] - every).double().mean()) == 0.5


@given(weights(), st.data())
def test_cuts_of_the_bytes_are_cuts_of_the_matrix(own: Q, data: st.DataObject) -> None:
    q, scale = own
    whole = (q.unflatten(-1, (-1, GROUP)) * scale.float().unsqueeze(-1)).flatten(-2)
    start = data.draw(st.integers(0, q.shape[0] - 1))
    end = data.draw(st.integers(start + 1, q.shape[0]))
    rows = nest_integers(q, scale, Layout.BY_OUTPUTS)[:, start:end]
    assert torch.equal(unnest(rows), whole[start:end])
    start, end = start // 32 * 32, -(-end // 32) * 32
    columns = nest_integers(q, scale, Layout.BY_INPUTS)[..., start // 2 : end // 2]
    assert torch.equal(unnest(columns), whole[start:end])


# from floating point


def test_a_group_s_scale_is_the_least_that_a_draft_reads_in_full() -> None:
    """At, below and above the largest magnitude of each scale that the high plane holds."""
    bits = torch.arange(0x80, 0xF800, 0x100) // 2
    held = bits.to(torch.int16).view(torch.float16).float()
    assert float(held[-1]) == LARGEST_SCALE
    border = held * 127.5
    assert torch.equal(draft_scales(border).float(), held)
    assert torch.equal(draft_scales(border.nextafter(torch.zeros(()))).float(), held)
    assert torch.equal(
        draft_scales(border.nextafter(torch.tensor(torch.inf)))[:-1].float(), held[1:]
    )
    none = torch.tensor([0.0, 1e-30, 127 * 2.0**-26])  # over 127, float16 has no number but 0
    assert torch.equal(draft_scales(none).float(), torch.zeros(3))


def test_the_full_path_s_error_grows_by_little() -> None:
    """Beside the scales of Q8_0, for numbers of a normal distribution."""
    groups = torch.randn(512, 8, GROUP, generator=torch.Generator().manual_seed(0))
    largest = groups.abs().amax(-1)
    errors = []
    for scale in (largest / 127, draft_scales(largest)):
        q, step = in_integers(groups, scale)
        values = q.unflatten(-1, (-1, GROUP)) * step.float().unsqueeze(-1)
        errors.append(float((values - groups).square().mean().sqrt()))
    assert 1 < errors[1] / errors[0] < 1.08


@given(st.integers(0, 2**32), layouts, st.sampled_from([1e-6, 1e-3, 1.0, 100.0]))
def test_rounding_is_at_most_half_a_step(seed: int, layout: Layout, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, 64, generator=generator) * size
    planes = nest(weight, layout)
    (_, step), (_, near) = integers(planes), integers(planes[:1])
    largest = weight.unflatten(-1, (-1, GROUP)).abs().amax(-1)
    assert torch.equal(step, draft_scales(largest).float())
    assert torch.equal(near[step > 0], step[step > 0])
    if size > 1e-3:  # no scale is subnormal
        assert torch.all(step <= largest / 127 * 1.125)
    error = (unnest(planes) - weight).unflatten(-1, (-1, GROUP)).abs()
    assert torch.all(error[step > 0] <= step[step > 0][:, None] * 0.5001)
    draft = (unnest(planes[:1]) - weight).unflatten(-1, (-1, GROUP)).abs()
    assert torch.all(draft[step > 0] <= step[step > 0][:, None] * 8.5001)


def test_zeros_are_zeros_in_both_paths() -> None:
    planes = nest(torch.zeros(32, 32), Layout.BY_OUTPUTS)
    assert torch.equal(unnest(planes), torch.zeros(32, 32))
    # The scale's lower byte at its middle is a number: not zero, and too small to matter.
    assert float(unnest(planes[:1]).abs().max()) < 1e-4


@pytest.mark.parametrize("largest", [-128, 127, 100, 3])
def test_integers_are_found_again(largest: int) -> None:
    """Of a tensor that was multiplied out, with any integer as the largest of its groups."""
    generator = torch.Generator().manual_seed(largest + 128)
    q = torch.randint(-abs(largest) + 1, abs(largest), (32, 96), generator=generator)
    q[:, ::GROUP] = largest
    scale = torch.rand(32, 3, generator=generator).half()
    values = (q.unflatten(-1, (-1, GROUP)) * scale.float().unsqueeze(-1)).flatten(-2)
    for layout in Layout:
        planes = nest_integers(*integers_of(values, dequantized=True), layout)
        assert torch.equal(unnest(planes), values)


def test_what_was_not_multiplied_out_is_rounded_as_ever() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    for dequantized in (False, True):
        own = integers_of(weight, dequantized)
        assert torch.equal(nest_integers(*own, Layout.BY_OUTPUTS), nest(weight, Layout.BY_OUTPUTS))


@pytest.mark.parametrize("bits", [4, 5])
def test_types_of_fewer_bits_are_rounded_for_the_draft(bits: int) -> None:
    """Of GGUF's Q4_0 and Q5_0: with their own scales, a draft would add half a step to each."""
    most = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(-most, most, (32, 96), generator=generator)
    scale = torch.rand(32, 3, generator=generator).half()
    values = (q.unflatten(-1, (-1, GROUP)) * scale.float().unsqueeze(-1)).flatten(-2)
    spec = WeightSpec(
        "w", "uint8", nested_shape(32, 96, Layout.BY_OUTPUTS), nested=Layout.BY_OUTPUTS
    )
    planes = stored_form(spec, values)
    assert torch.equal(planes, nest(values, Layout.BY_OUTPUTS))
    own = nest_integers(*integers_of(values, dequantized=True), Layout.BY_OUTPUTS)
    assert torch.equal(unnest(own), values)
    better, worse = ((unnest(p[:1]) - values).square().mean() for p in (planes, own))
    assert better < worse


# what is stored


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_checkpoints_tensor_is_stored_in_its_layout(
    layout: Layout, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    stored_so = matrix if (layout is Layout.BY_INPUTS) == transposed else matrix.mT
    spec = WeightSpec(
        "w", "uint8", nested_shape(96, 64, layout), transposed, retype=False, nested=layout
    )
    assert checkpoint_shape(spec) == tuple(stored_so.shape)
    assert spec.numbers == matrix.numel()
    assert torch.equal(stored_form(spec, stored_so), nest(matrix, layout))
    monkeypatch.setattr("sirius_passes.stored_form._BLOCK", 64 * 32)  # in three parts
    assert torch.equal(stored_form(spec, stored_so.bfloat16()), nest(matrix.bfloat16(), layout))


def test_numbers_beyond_all_scales_are_refused_by_name() -> None:
    spec = WeightSpec(
        "big.weight", "uint8", nested_shape(1, 32, Layout.BY_OUTPUTS), nested=Layout.BY_OUTPUTS
    )
    weight = torch.zeros(1, 32)
    weight[0, 5] = -1e7
    refused = r"big.weight holds a number of magnitude 1e\+07, .* --weights int8"
    with pytest.raises(UnsupportedModelError, match=refused):
        stored_form(spec, weight)


def test_why_a_matrix_cant_be_nested() -> None:
    assert why_not(7, 64, Layout.BY_OUTPUTS) is None
    assert why_not(7, 48, Layout.BY_OUTPUTS) == "its 48 inputs are not a multiple of 32"
    assert why_not(7, 64, Layout.BY_INPUTS) == "its 7 outputs are not a multiple of 32"


# activations


@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_activations_are_whole_steps_of_their_own_group(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 64, generator=generator).to(dtype)
    x[1, :32] = 0
    found = in_steps(x)
    step = x.float().unflatten(-1, (-1, GROUP)).abs().amax(-1, keepdim=True) / 127
    error = (found - x.float()).unflatten(-1, (-1, GROUP)).abs()
    assert torch.all(error <= step * (0.5 + 1e-4))
    assert torch.equal(found[1, :32], torch.zeros(32))
    # A token's numbers are the same alone and among others.
    assert torch.equal(in_steps(x[2]), found[2])


@given(weights(), layouts)
def test_a_product_is_that_of_whole_steps(own: Q, layout: Layout) -> None:
    q, _ = own
    scale = torch.full((q.shape[0], q.shape[1] // GROUP), 2.0**-7, dtype=torch.float16)
    x = torch.randint(
        -127, 128, (2, q.shape[1]), generator=torch.Generator().manual_seed(3)
    ).float()
    x[:, ::GROUP] = 127  # so that its steps are of 1
    bias = torch.arange(q.shape[0]).float()
    y = product(x, nest_integers(q, scale, layout), bias)
    torch.testing.assert_close(y, x @ q.float().mT * 2.0**-7 + bias)
