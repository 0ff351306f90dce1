"""What a period leaves in the caches: the kept path's K/V in the slots of its positions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sirius_runtime.drafting import first_levels
from sirius_runtime.plan import Plan
from sirius_runtime.policy import Draft
from sirius_runtime.tree import Level
from tests.support.batch import Batch
from tests.support.drafts import RandomDraft, build, random_drafts

CAPACITY = 100


def session_over(lengths: list[int]) -> Batch:
    """A session whose caches hold the number of each slot in it; of no program that could run."""
    program = SimpleNamespace(
        state=SimpleNamespace(layers=2, kv_heads=1, key_dim=2, value_dim=3),
        entries=(),
        model=SimpleNamespace(max_seq_len=CAPACITY),
        sparsity=SimpleNamespace(counted=()),
    )
    backend = SimpleNamespace(
        program=program, device=torch.device("cpu"), dtype=torch.float32, limits=None
    )
    session = Batch(cast(Any, backend), len(lengths), CAPACITY)
    for cache in (session.state.k_cache, session.state.v_cache):
        cache.copy_(torch.arange(float(CAPACITY))[:, None].expand(cache.shape))
    session.state.length = torch.tensor(lengths)
    return session


def slots(session: Batch, row: int) -> list[int]:
    """Whose K/V each slot of the row's history now holds, by the slots before the commit."""
    length = int(session.state.length[row])
    held = [cache[:, row, :, :length] for cache in (session.state.k_cache, session.state.v_cache)]
    first = held[0][0, 0, :, 0]
    for cache in held:
        assert torch.equal(cache, first[:, None].expand(cache.shape))
    return [int(slot) for slot in first]


def plan(size: int, width: int) -> Plan:
    return Plan(period=size, width=width, rule="sirius", threshold=0.1)


@settings(max_examples=100)
@given(random_drafts(), st.data())
def test_the_history_is_the_kept_path_s(given_: RandomDraft, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 30), min_size=given_.rows, max_size=given_.rows))
    session = session_over(lengths)
    most = torch.full((given_.rows,), given_.size)
    verdict = session.commit(given_.draft, given_.logits, plan(given_.size, given_.width), most)
    for row, length in enumerate(lengths):
        advance = int(verdict.advance[row])
        assert session.state.length[row] == length + advance
        kept = [length + node for node in verdict.nodes[row, :advance].tolist()]
        assert slots(session, row) == [*range(length), *kept]


@pytest.mark.parametrize("size", [3, 6, 16])
def test_a_tree_of_fewer_nodes_than_a_path_may_have_is_compacted_too(size: int) -> None:
    """One that stopped early: a chain is told by its width, not by how many nodes it has."""
    levels = [
        Level(torch.tensor([[1, 2]]), torch.tensor([[0, 0]]), torch.tensor([[-1.0, -2.0]])),
        Level(torch.tensor([[3, 4]]), torch.tensor([[1, 2]]), torch.tensor([[-3.0, -4.0]])),
    ]
    tree = build(torch.tensor([0]), levels, size, 2)
    draft = first_levels(Draft(tree, torch.tensor([2]), None), 2, 2)
    choices = torch.tensor([[2, 0, 4, 0, 5]])  # root, node 2, node 4, then token 5
    logits = 10 * torch.nn.functional.one_hot(choices, 6).float()
    session = session_over([7])
    verdict = session.commit(draft, logits, plan(size, 2), torch.tensor([size]))
    assert verdict.nodes[0, :3].tolist() == [0, 2, 4]
    assert slots(session, 0) == [*range(7), 7, 9, 11]


def test_an_inactive_row_stays_as_it_is() -> None:
    session = session_over([4, 6])
    session.state.active = torch.tensor([True, False])
    session.state.root = torch.tensor([3, 3])
    draft = Draft(build(session.state.root, [], 1, 2), torch.tensor([0, 0]), None)
    logits = torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(2, 1, 4)
    session.commit(draft, logits, plan(1, 2), torch.tensor([1, 1]))
    assert session.state.length.tolist() == [5, 6]
    assert session.state.root.tolist() == [1, 3]
