"""The laws of Sirius that concern the chain and the tree-ready operators, over random requests.

1 thresholds 0 and above 1, 2 exact mode is dense greedy, 3 a tree's node is its path, 4 committed
K/V is the dense one, 5 nothing skipped is nothing changed, 6 nothing shown is taken back, 7 one
copy of each weight.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sirius_runtime
from sirius_runtime.model import Mode, SiriusModel
from sirius_runtime.policy import ExactAcceptance, ThresholdAcceptance, chain_mask
from sirius_runtime.session import Session
from sirius_runtime.text import TextStream
from tests.support.models import (
    METHODS,
    VOCABULARY,
    Rows,
    Tiny,
    TinyModels,
    bound_weights,
    open_session,
    state_of,
)
from tests.support.naive import ancestors, tree_mask

TEMPERATURE = 0.6
ABOVE_ONE = 1.01
CPU = torch.device("cpu")

token_ids = st.integers(6, VOCABULARY - 1)
prompts = st.lists(token_ids, min_size=1, max_size=20)
batches = st.lists(prompts, min_size=1, max_size=3)
periods = st.integers(1, 9)
thresholds = st.sampled_from([0.0, 0.02, 0.1, 0.3, 1.0, ABOVE_ONE])
lengths = st.integers(1, 20)


@pytest.fixture(scope="module", params=METHODS)
def subject(request: pytest.FixtureRequest, tiny: TinyModels) -> Tiny:
    return tiny(method=request.param)


# 1: thresholds


@given(batches, periods, st.floats(0.1, 3.0))
def test_threshold_zero_accepts_every_draft(
    subject: Tiny, batch: Rows, size: int, temperature: float
) -> None:
    session = open_session(subject.model, len(batch))
    session.prefill(batch)
    for _ in range(2):
        chunk = session.draft(size)
        verdict = session.commit(
            chunk, session.verify(chunk), ThresholdAcceptance(0.0, temperature)
        )
        assert verdict.advance.tolist() == [size] * len(batch)
        assert torch.equal(verdict.tokens[:, :-1], chunk[:, 1:])


@given(batches, periods, lengths)
def test_threshold_above_one_is_dense_greedy_a_token_a_period(
    subject: Tiny, batch: Rows, period: int, new_tokens: int
) -> None:
    output = subject.model.generate(
        batch, threshold=ABOVE_ONE, period=period, max_new_tokens=new_tokens
    )
    assert output.tokens == tuple(subject.greedy(prompt, new_tokens) for prompt in batch)
    assert output.stats.advances.keys() <= {1}


# 2: exact mode


@given(batches, periods, lengths)
def test_exact_mode_is_transformers_greedy(
    subject: Tiny, batch: Rows, period: int, new_tokens: int
) -> None:
    output = subject.model.generate(
        batch, mode=Mode.EXACT, period=period, max_new_tokens=new_tokens
    )
    assert output.tokens == tuple(subject.greedy(prompt, new_tokens) for prompt in batch)


@pytest.mark.parametrize("method", ["griffin", "topk", "cats"])
def test_exact_mode_refuses_some_drafts_and_accepts_others(tiny: TinyModels, method: str) -> None:
    """What the law above is worth: the sparse path is neither always right nor always wrong."""
    batch = [[7, 8, 9], [50, 30, 11, 22, 60]]
    output = tiny(method=method).model.generate(
        batch, mode=Mode.EXACT, period=8, max_new_tokens=40, eos_token_id=[]
    )
    assert output.stats.corrections > 3
    assert max(output.stats.advances) > 3


# 3: trees


@st.composite
def trees(draw: st.DrawFn, most: int = 8) -> list[int]:
    """The parent of each node, one of the three before it: deep trees; -1 for the root."""
    size = draw(st.integers(1, most))
    return [-1] + [draw(st.integers(max(0, node - 3), node - 1)) for node in range(1, size)]


class TreeRun:
    """Prompts in the cache, and blocks of tokens after them that leave the Session as it was."""

    def __init__(self, model: SiriusModel, batch: Rows) -> None:
        self._backend = model.backend
        session = open_session(model, len(batch))
        session.prefill(batch)
        self._length = session.length
        self._state = state_of(session)

    def copy(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def run(
        self,
        entry: str,
        ids_BT: Tensor,
        nodes: Sequence[int],
        mask_NN: Tensor,
        state: dict[str, Tensor],
    ) -> Tensor:
        """Logits [B, T, V] of some `nodes` of a tree; writes their K/V to `state`."""
        slots = self._length[:, None] + torch.tensor(nodes)
        depth = (mask_NN >= 0).sum(1) - 1
        known = {
            "input_ids": ids_BT,
            "slots": slots,
            "positions": self._length[:, None] + depth[list(nodes)],
            "length": self._length,
            "tree_mask": mask_NN[list(nodes)][None],
            **state,
        }
        uses = self._backend.program.entry(entry).inputs
        return self._backend.run(entry, {i.name: known[i.name] for i in uses})["logits"]


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
        mask = chain_mask(len(path), CPU)[0]
        alone = run.run(entry, ids[:, path], range(len(path)), mask, run.copy())
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


@pytest.mark.parametrize("size", [1, 2, 7])
def test_tree_of_width_one_has_the_mask_of_the_chain(size: int) -> None:
    assert torch.equal(tree_mask(range(-1, size - 1)), chain_mask(size, CPU)[0])


# 4: committed K/V


def committed(session: Session, row: int, length: int) -> tuple[Tensor, Tensor]:
    """K and V [layers, kv_heads, length, D] of a row."""
    state = state_of(session)
    return state["k_cache"][:, row, :, :length], state["v_cache"][:, row, :, :length]


def assert_dense(session: Session, model: SiriusModel, histories: Rows) -> None:
    """Every row's committed K/V is that of a prefill of the same tokens."""
    dense = open_session(model, len(histories))
    dense.prefill(histories)
    assert session.length.tolist() == [len(history) for history in histories]
    for row, history in enumerate(histories):
        found, expected = (committed(s, row, len(history)) for s in (session, dense))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@given(batches, st.lists(periods, min_size=1, max_size=4), thresholds, st.booleans())
def test_committed_kv_is_the_dense_one_after_each_period(
    subject: Tiny, batch: Rows, sizes: list[int], threshold: float, exact: bool
) -> None:
    acceptance = ExactAcceptance() if exact else ThresholdAcceptance(threshold, TEMPERATURE)
    session = open_session(subject.model, len(batch))
    roots = session.prefill(batch).tolist()
    histories = [list(prompt) for prompt in batch]
    for size in sizes:
        verdict = session.period(size, acceptance)
        rows = zip(verdict.tokens.tolist(), verdict.advance.tolist(), strict=True)
        for row, (tokens, advance) in enumerate(rows):
            *kept, roots[row] = [roots[row], *tokens[:advance]]
            histories[row] += kept
        assert session.root.tolist() == roots
        assert_dense(session, subject.model, histories)


def test_drafting_leaves_sparse_kv_for_the_verification_to_overwrite(tiny: TinyModels) -> None:
    """What the law above is worth: without the rewriting it would not hold."""
    model = tiny(method="griffin").model
    session = open_session(model, 1)
    prompt = [7, 8, 9]
    session.prefill([prompt])
    chunk = session.draft(5)
    sparse_k = state_of(session)["k_cache"][1, 0, :, 3:8].clone()
    session.verify(chunk)
    full_k = state_of(session)["k_cache"][1, 0, :, 3:8]
    assert ((sparse_k - full_k).abs().amax((0, 2)) > 0.1).all()


def test_finished_rows_keep_their_state(tiny: TinyModels) -> None:
    model = tiny(method="griffin").model
    session = open_session(model, 2)
    session.prefill([[7, 8, 9], [50, 30]])
    session.active = torch.tensor([True, False])
    root = session.root.clone()
    session.period(4, ThresholdAcceptance(0.0, TEMPERATURE))
    assert session.length.tolist() == [7, 2]
    assert session.root[1] == root[1]


# 5: nothing skipped


@pytest.mark.parametrize("method", METHODS)
@given(batch=batches)
def test_sparse_logits_of_all_neurons_are_the_full_ones(
    tiny: TinyModels, method: str, batch: Rows
) -> None:
    run = TreeRun(tiny(method=method, keep=1.0).model, batch)
    ids = torch.tensor([[prompt[0]] for prompt in batch])
    sparse, full = (
        run.run(entry, ids, [0], torch.zeros(1, 1, dtype=torch.int64), run.copy())
        for entry in ("sparse", "full")
    )
    assert torch.equal(sparse, full)


@pytest.mark.parametrize("method", METHODS)
@given(batch=batches, period=periods, mode=st.sampled_from([Mode.EXACT, Mode.SIRIUS]))
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


# 6: streaming


class Recorder:
    """A streamer that keeps what it was given, call by call; the first is the prompt."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.calls.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@given(prompts, periods, thresholds, lengths, st.sampled_from(list(Mode)))
def test_streamed_tokens_are_a_prefix_of_the_final_ones(
    subject: Tiny, prompt: list[int], period: int, threshold: float, new_tokens: int, mode: Mode
) -> None:
    recorder = Recorder()
    output = subject.model.generate(
        prompt,
        mode=mode,
        period=period,
        threshold=threshold,
        max_new_tokens=new_tokens,
        streamer=recorder,
    )
    assert recorder.ended
    shown, *puts = recorder.calls
    assert shown == prompt
    streamed: list[int] = []
    for tokens in puts:
        assert tokens
        streamed += tokens
        assert tuple(streamed) == output.tokens[0][: len(streamed)]
    assert tuple(streamed) == output.tokens[0]


@given(prompts, periods, thresholds, lengths, st.data())
def test_streamed_text_is_the_final_text(
    subject: Tiny,
    prompt: list[int],
    period: int,
    threshold: float,
    new_tokens: int,
    data: st.DataObject,
) -> None:
    model = subject.model

    def run(stop: tuple[str, ...], write: list[str]) -> str:
        assert model.tokenizer is not None
        output = model.generate(
            prompt,
            period=period,
            threshold=threshold,
            max_new_tokens=new_tokens,
            stop=stop,
            streamer=TextStream(model.tokenizer, write.append, stop),
        )
        assert output.texts is not None
        return output.texts[0]

    plain: list[str] = []
    text = run((), plain)
    assert "".join(plain) == text
    if text:
        start = data.draw(st.integers(0, len(text) - 1))
        stop = text[start : data.draw(st.integers(start + 1, min(len(text), start + 9)))]
        stopped: list[str] = []
        assert run((stop,), stopped) == "".join(stopped) == text[: text.index(stop)]


# 7: one copy of each weight


def assert_one_copy(model: SiriusModel) -> None:
    """All entries read the same storage; no two weights overlap, and none is there twice."""
    entries = {entry.name: bound_weights(model, entry.name) for entry in model.program.entries}
    assert {"full", "sparse", "prefill"} == entries.keys()
    assert entries["full"].keys() == entries["sparse"].keys() == entries["prefill"].keys()
    pointers = {name: tensor.data_ptr() for name, tensor in entries["full"].items()}
    for bound in entries.values():
        assert {name: tensor.data_ptr() for name, tensor in bound.items()} == pointers
    assert len(set(pointers.values())) == len(pointers)
    elements = sum(tensor.numel() for tensor in entries["full"].values())
    constants = sum(
        tensor.numel() for name, tensor in entries["full"].items() if "inv_freq" in name
    )
    assert elements - constants == model.program.model.parameters


@pytest.mark.parametrize("method", METHODS)
def test_paths_share_every_weight(tiny: TinyModels, method: str) -> None:
    assert_one_copy(tiny(method=method).model)


@pytest.mark.parametrize("method", METHODS)
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
    assert_one_copy(sirius_runtime.load(made.compiled.save(tmp_path / "m.sirius"), device="cpu"))


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
