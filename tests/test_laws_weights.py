"""The laws of Sirius that concern which weights are read.

5 nothing skipped is nothing changed, 7 one copy of each weight. The others are in `test_laws` and
`test_laws_state`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sirius_runtime
from sirius_runtime.model import Mode, SiriusModel
from sirius_runtime.plan import Plan
from tests.support.models import (
    EVERY_METHOD,
    VOCABULARY,
    Rows,
    TinyModels,
    TreeRun,
    bound_weights,
    open_session,
    trees,
)
from tests.support.naive import tree_mask

token_ids = st.integers(6, VOCABULARY - 1)
prompts = st.lists(token_ids, min_size=1, max_size=20)
batches = st.lists(prompts, min_size=1, max_size=3)
sizes = st.integers(1, 9)
widths = st.integers(1, 8)

# 5: nothing skipped


@pytest.mark.parametrize("method", EVERY_METHOD)
@given(batch=batches, parents=trees(), seed=st.integers(0, 2**32))
def test_sparse_logits_of_all_neurons_are_the_full_ones(
    tiny: TinyModels, method: str, batch: Rows, parents: list[int], seed: int
) -> None:
    run = TreeRun(tiny(method=method, keep=1.0).model, batch)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (len(batch), len(parents)), generator=generator)
    sparse, full = (
        run.run(entry, ids, range(len(parents)), tree_mask(parents), run.copy())
        for entry in ("sparse", "full")
    )
    assert torch.equal(sparse, full)


@pytest.mark.parametrize("method", EVERY_METHOD)
@given(batch=batches, size=sizes, width=widths, temperature=st.floats(0.3, 3.0))
def test_scores_of_all_neurons_are_the_full_path_s(
    tiny: TinyModels, method: str, batch: Rows, size: int, width: int, temperature: float
) -> None:
    """Level by level over sparse K/V, or all at once: the same tree."""
    session = open_session(tiny(method=method, keep=1.0).model, len(batch))
    session.prefill(batch)
    plan = Plan(size, width, verify_temperature=temperature)
    draft = session.draft(plan, torch.full((len(batch),), size))
    tree = draft.tree
    log_p = (session.verify(draft) / temperature).log_softmax(-1)
    gain = log_p.flatten(1).gather(1, tree.parents * VOCABULARY + tree.tokens)
    expected = ((tree.mask >= 0) * gain[:, None, :])[:, :, 1:].sum(-1)
    torch.testing.assert_close(tree.scores, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", EVERY_METHOD)
@given(batch=batches, period=sizes, mode=st.sampled_from([Mode.EXACT, Mode.SIRIUS]))
def test_all_neurons_advance_by_the_period(
    tiny: TinyModels, method: str, batch: Rows, period: int, mode: Mode
) -> None:
    output = tiny(method=method, keep=1.0).model.generate(
        batch,
        mode=mode,
        threshold=1 / VOCABULARY,  # the likeliest token always has that much
        period=period,
        max_new_tokens=1 + 3 * period,
        eos_token_id=[],
    )
    assert output.stats.advances == {period: 3 * len(batch)}
    assert output.stats.aal == period
    assert output.stats.corrections == 0


@pytest.mark.parametrize("method", EVERY_METHOD)
@given(batch=batches, period=sizes, width=widths)
def test_all_neurons_advance_by_the_period_in_trees(
    tiny: TinyModels, method: str, batch: Rows, period: int, width: int
) -> None:
    output = tiny(method=method, keep=1.0).model.generate(
        batch,
        # The best path of a level is at least as likely as the best one above with its likeliest
        # token, which has 1 / V: no token of it can have less than that to the power of the depth.
        threshold=0.99 * VOCABULARY ** -(period - 1.0),
        period=period,
        tree_width=width,
        max_new_tokens=1 + 3 * period,
        eos_token_id=[],
    )
    assert output.stats.advances == {period: 3 * len(batch)}
    assert output.stats.corrections == 0


# 7: one copy of each weight


def assert_one_copy(model: SiriusModel) -> None:
    """All entries read the same storage; no two weights overlap, and none is there twice."""
    entries = {"full", "sparse", "prefill"}
    if model.program.sparsity.method.per_prompt:
        entries.add("observe")
    assert set(model.backend._entries) == entries  # type: ignore[attr-defined]
    bound = {name: bound_weights(model, name) for name in entries}
    pointers = {name: tensor.data_ptr() for name, tensor in bound["full"].items()}
    for weights in bound.values():
        assert {name: tensor.data_ptr() for name, tensor in weights.items()} == pointers
    assert len(set(pointers.values())) == len(pointers)
    elements = sum(tensor.numel() for tensor in bound["full"].values())
    constants = sum(tensor.numel() for name, tensor in bound["full"].items() if "inv_freq" in name)
    assert elements - constants == model.program.model.parameters


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_paths_share_every_weight(tiny: TinyModels, method: str) -> None:
    assert_one_copy(tiny(method=method).model)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_paths_share_every_weight_of_a_loaded_artifact(
    tiny: TinyModels, method: str, tmp_path: Path
) -> None:
    made = tiny(method=method)
    loaded = sirius_runtime.load(made.compiled.save(tmp_path / "model.sirius"), device="cpu")
    assert_one_copy(loaded)
    prompt = [7, 8, 9]
    assert loaded.generate(prompt, max_new_tokens=20).tokens == (
        made.model.generate(prompt, max_new_tokens=20).tokens
    )


def test_tied_embeddings_are_one_weight(tiny: TinyModels, tmp_path: Path) -> None:
    made = tiny(tie_word_embeddings=True)
    expected = sum(parameter.numel() for parameter in made.reference.parameters())
    assert made.model.program.model.parameters == expected
    assert_one_copy(made.model)
    path = made.compiled.save(tmp_path / "m.sirius")
    assert_one_copy(sirius_runtime.load(path, device="cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loaded_weights_lie_inside_the_file(tiny: TinyModels, tmp_path: Path) -> None:
    path = tiny(method="griffin").compiled.save(tmp_path / "model.sirius")
    model = sirius_runtime.load(path, device="cpu")
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    weights = bound_weights(model, "sparse")
    assert weights
    for tensor in weights.values():
        start = tensor.data_ptr()
        assert any(start in r and start + tensor.nbytes - 1 in r for r in mapped)


def test_weights_of_another_dtype_are_still_shared(tiny: TinyModels, tmp_path: Path) -> None:
    path = tiny(method="griffin").compiled.save(tmp_path / "model.sirius")
    model = sirius_runtime.load(path, device="cpu", dtype="bfloat16")
    assert_one_copy(model)
    assert len(model.generate([7, 8, 9], max_new_tokens=5).tokens[0]) == 5
