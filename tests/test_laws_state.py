"""The laws of Sirius that concern logits and caches, for chains and for trees.

3 a tree's node is its path, 4 committed K/V is the dense one. The others are in `test_laws` and
`test_laws_weights`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sirius_runtime.model import SiriusModel
from sirius_runtime.plan import Plan
from sirius_runtime.rules import RULES
from sirius_runtime.tensor_state import TensorState
from tests.support.batch import Batch
from tests.support.fast import gate_but
from tests.support.models import (
    EVERY_METHOD,
    VOCABULARY,
    Rows,
    Tiny,
    TinyModels,
    TreeRun,
    chain_mask,
    open_session,
    state_of,
    trees,
)
from tests.support.naive import ancestors, tree_mask

TEMPERATURE = 0.6

token_ids = st.integers(6, VOCABULARY - 1)
prompts = st.lists(token_ids, min_size=1, max_size=20)
batches = st.lists(prompts, min_size=1, max_size=3)
sizes = st.integers(1, 9)
widths = st.integers(1, 8)


@pytest.fixture(scope="module", params=EVERY_METHOD)
def subject(request: pytest.FixtureRequest, tiny: TinyModels) -> Tiny:
    return tiny(method=request.param)


# 3: trees


FAMILIES = {
    "llama": ("llama", {}),
    "gemma2": ("gemma2", {"sliding_window": 3}),  # windows, which count depth, and softcap
}


@pytest.mark.parametrize("entry", ["full", "sparse"])
@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_node_of_a_tree_is_its_path_alone(
    tiny: TinyModels, family: str, entry: str, data: st.DataObject
) -> None:
    model_type, config = FAMILIES[family]
    batch, parents = data.draw(batches), data.draw(trees())
    run = TreeRun(tiny(model_type, "griffin", **config).model, batch)
    nodes = range(len(parents))
    ids = torch.tensor([data.draw(st.lists(token_ids, min_size=8, max_size=8)) for _ in batch])
    logits = run.run(entry, ids[:, : len(parents)], nodes, tree_mask(parents), run.copy())
    for node in nodes:
        path = ancestors(parents, node)[::-1]
        alone = run.run(entry, ids[:, path], range(len(path)), chain_mask(len(path)), run.copy())
        torch.testing.assert_close(logits[:, node], alone[:, -1], rtol=0, atol=2e-5)


@given(batches, trees(), st.integers(0, 2**32))
def test_tree_run_level_by_level_is_the_tree(
    tiny: TinyModels, batch: Rows, parents: list[int], seed: int
) -> None:
    run = TreeRun(tiny(method="griffin").model, batch)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (len(batch), len(parents)), generator=generator)
    mask = tree_mask(parents)
    together = run.run("full", ids, range(len(parents)), mask, run.copy())
    state = run.copy()
    depth = [len(ancestors(parents, node)) for node in range(len(parents))]
    for level in range(1, max(depth) + 1):
        nodes = [node for node in range(len(parents)) if depth[node] == level]
        logits = run.run("full", ids[:, nodes], nodes, mask, state)
        torch.testing.assert_close(logits, together[:, nodes], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", gate_but(FAMILIES, {"llama"}))
@given(batches, st.integers(1, 5), widths)
def test_node_of_a_drafted_tree_is_its_path_alone(
    tiny: TinyModels, family: str, batch: Rows, size: int, width: int
) -> None:
    model_type, config = FAMILIES[family]
    run = TreeRun(tiny(model_type, "griffin", **config).model, batch)
    most = torch.full((len(batch),), size)
    draft = run.session.draft(Plan(size, width, verify_temperature=TEMPERATURE), most)
    tree, logits = draft.tree, run.session.verify(draft)
    for node in range(tree.tokens.shape[1]):
        # Each row has a tree of its own; the node has one depth in all of them.
        count = int(tree.depth[0, node]) + 1
        path = tree.mask[:, node].argsort(dim=1, descending=True)[:, :count]
        alone = run.run(
            "full", tree.tokens.gather(1, path), range(count), chain_mask(count), run.copy()
        )
        torch.testing.assert_close(logits[:, node], alone[:, -1], rtol=0, atol=2e-5)


# 4: committed K/V


def committed(session: Batch, row: int, length: int) -> tuple[Tensor, Tensor]:
    """K and V [layers, kv_heads, length, D] of a row."""
    state = state_of(session)
    return state["k_cache"][:, row, :, :length], state["v_cache"][:, row, :, :length]


def dense_session(model: SiriusModel, histories: Rows) -> Batch:
    session = open_session(model, len(histories))
    session.prefill(histories)
    return session


def assert_dense(session: Batch, model: SiriusModel, histories: Rows) -> None:
    """Every row's committed K/V is that of a prefill of the same tokens."""
    dense = dense_session(model, histories)
    assert session.state.length.tolist() == [len(history) for history in histories]
    for row, history in enumerate(histories):
        found, expected = (committed(s, row, len(history)) for s in (session, dense))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Histories:
    """A session in progress, and the tokens of each row whose K/V it has committed."""

    def __init__(self, session: Batch, batch: Rows) -> None:
        self.session = session
        self.roots = session.prefill(batch).tolist()
        self.committed = [list(prompt) for prompt in batch]

    def period(self, plan: Plan, most: Sequence[int]) -> None:
        committed, advances, _ = self.session.period(plan, torch.tensor(most))
        rows = zip(committed.tolist(), advances.tolist(), strict=True)
        for row, (tokens, advance) in enumerate(rows):
            assert 1 <= advance <= most[row]
            *kept, self.roots[row] = [self.roots[row], *tokens[:advance]]
            self.committed[row] += kept
        assert self.session.state.root.tolist() == self.roots


@st.composite
def plans(draw: st.DrawFn, rows: int) -> Plan:
    size, rule = draw(sizes), draw(st.sampled_from(list(RULES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    noise = torch.rand(rows, 2, size, dtype=torch.float64, generator=generator)
    return Plan(
        size,
        draw(widths),
        rule=rule,
        threshold=draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 1.0, 1.01])),
        verify_temperature=TEMPERATURE,
        confidence=draw(st.sampled_from([0.0, 0.2, 0.8])),
        noise=noise if RULES[rule].draws else None,
    )


@given(st.data())
def test_committed_kv_is_the_dense_one_after_each_period(
    subject: Tiny, data: st.DataObject
) -> None:
    batch = data.draw(batches)
    histories = Histories(open_session(subject.model, len(batch)), batch)
    for _ in range(data.draw(st.integers(1, 4))):
        plan = data.draw(plans(len(batch)))
        most = [data.draw(st.integers(1, plan.period)) for _ in batch]
        histories.period(plan, most)
        assert_dense(histories.session, subject.model, histories.committed)


@given(batches, st.integers(1, 6), st.integers(2, 8))
def test_committed_kv_is_the_dense_one_with_windows(
    tiny: TinyModels, batch: Rows, size: int, width: int
) -> None:
    """A window sees positions, not slots: before the compaction they differ."""
    model_type, config = FAMILIES["gemma2"]
    model = tiny(model_type, "griffin", **config).model
    histories = Histories(open_session(model, len(batch)), batch)
    for _ in range(2):
        histories.period(Plan(size, width, threshold=0.0), [size] * len(batch))
        assert_dense(histories.session, model, histories.committed)


@pytest.mark.parametrize("width", [1, 3])
def test_drafting_leaves_sparse_kv_for_the_verification_to_overwrite(
    tiny: TinyModels, width: int
) -> None:
    """What the law above is worth: without the rewriting it would not hold."""
    session = open_session(tiny(method="griffin").model, 1)
    session.prefill([[7, 8, 9]])
    draft = session.draft(Plan(5, width), torch.tensor([5]))
    # The nodes of the last level are drafted, but no sparse step has run over them.
    last = 3 + 3 * width + 1
    sparse_k = state_of(session)["k_cache"][1, 0, :, 3:last].clone()
    session.verify(draft)
    full_k = state_of(session)["k_cache"][1, 0, :, 3:last]
    assert ((sparse_k - full_k).abs().amax((0, 2)) > 0.1).all()


def test_without_compaction_a_path_lies_elsewhere(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the law above is worth for trees."""
    model = tiny(method="griffin").model
    monkeypatch.setattr(TensorState, "compact", lambda *_: None)
    histories = Histories(open_session(model, 1), [[7, 8, 9]])
    histories.period(Plan(5, 3, threshold=0.0), [5])
    with pytest.raises(AssertionError, match="not close"):
        assert_dense(histories.session, model, histories.committed)


@pytest.mark.parametrize("width", [1, 3])
def test_finished_rows_keep_their_state(tiny: TinyModels, width: int) -> None:
    model = tiny(method="griffin").model
    session = open_session(model, 2)
    session.prefill([[7, 8, 9], [50, 30]])
    session.set_active([True, False])
    root = session.state.root.clone()
    kept = [cache.clone() for cache in committed(session, 1, 2)]
    session.period(Plan(4, width, threshold=0.0), torch.tensor([4, 1]))
    assert session.state.length.tolist() == [7, 2]
    assert session.state.root[1] == root[1]
    for cache, before in zip(committed(session, 1, 2), kept, strict=True):
        assert torch.equal(cache, before)


@given(batches, st.lists(st.tuples(sizes, widths), min_size=1, max_size=3))
def test_neurons_chosen_anew_are_those_of_all_verified_tokens(
    tiny: TinyModels, batch: Rows, shapes: list[tuple[int, int]]
) -> None:
    """As if the history were the prompt: drafts that were refused leave no trace."""
    model = tiny(method="griffin").model
    histories = Histories(open_session(model, len(batch), refresh=1), batch)
    for size, width in shapes:
        histories.period(Plan(size, width, threshold=0.3), [size] * len(batch))
        session, dense = histories.session, dense_session(model, histories.committed)
        assert session.state.statistic is not None
        assert dense.state.statistic is not None
        torch.testing.assert_close(
            session.state.statistic, dense.state.statistic, rtol=0, atol=1e-4
        )
        neurons = state_of(session)["neurons"]
        kept = dense.state.statistic.gather(2, neurons).sum(2)
        best = dense.state.statistic.gather(2, state_of(dense)["neurons"]).sum(2)
        torch.testing.assert_close(kept, best, rtol=0, atol=1e-3)  # but for true ties
