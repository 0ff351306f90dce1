"""Loops and conditions in Python, against torch's own operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from sirius_runtime import control_flow

while_loop, cond = torch.ops.higher_order.while_loop, torch.ops.higher_order.cond


def below(limit: int) -> fx.GraphModule:
    return fx.symbolic_trace(Below(limit))


class Below(torch.nn.Module):
    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, count: Tensor, total: Tensor, step: Tensor) -> Tensor:
        return count < self.limit


class Add(torch.nn.Module):
    def forward(self, count: Tensor, total: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        return count + 1, total + step * count


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_a_loop_carries_what_torch_s_carries(limit: int) -> None:
    carried, given = (torch.tensor(0), torch.zeros(2)), (torch.tensor([1.0, 3.0]),)
    body = fx.symbolic_trace(Add())
    expected = while_loop(below(limit), body, carried, given)
    for actual in (
        control_flow.while_loop(below(limit), body, carried, given),
        control_flow.while_loop(below(limit), body, list(carried), list(given)),
    ):
        assert len(actual) == 2
        assert all(map(torch.equal, actual, expected))
    assert int(expected[0]) == limit


@pytest.mark.parametrize("which", [True, False])
def test_a_condition_chooses_as_torch_s(which: bool) -> None:
    def yes(x: Tensor) -> tuple[Tensor]:
        return (x + 1,)

    def no(x: Tensor) -> tuple[Tensor]:
        return (x - 1,)

    x, flag = torch.ones(2), torch.tensor(which)
    (expected,) = cond(flag, yes, no, (x,))
    (actual,) = control_flow.cond(flag, yes, no, (x,))
    assert torch.equal(actual, expected)
    assert torch.equal(control_flow.cond(flag.view(1), yes, no, [x])[0], expected)


def test_every_loop_and_condition_of_a_graph_is_rewritten() -> None:
    graph = fx.Graph()
    root = torch.nn.Module()
    root.goes, root.body, root.other = below(3), fx.symbolic_trace(Add()), torch.nn.Identity()
    count, total, step = (graph.placeholder(name) for name in ("count", "total", "step"))
    names = [graph.get_attr(name) for name in ("goes", "body")]
    loop = graph.call_function(while_loop, (*names, (count, total), (step,)))
    graph.output(loop)
    control_flow.as_python(graph)
    assert loop.target is control_flow.while_loop
    module = fx.GraphModule(root, graph)
    count, total = module(torch.tensor(1), torch.tensor(0.5), torch.tensor(2.0))
    assert (int(count), float(total)) == (3, 0.5 + 2 + 4)
