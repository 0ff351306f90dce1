"""Weights in two tiers where a prompt chooses neurons: its rows are moved in once."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sirius_compile import CompileConfig, compile_model
from sirius_runtime import load
from sirius_runtime.backends.tiered import TieredBackend
from sirius_runtime.errors import ArtifactError, OperandError
from sirius_runtime.kernels.mlp import keeping
from sirius_runtime.model import SiriusModel
from sirius_runtime.nested import nest
from sirius_runtime.operators import OPERATORS
from sirius_runtime.ops.chosen import chosen_shape, copy_rows, spreading
from sirius_runtime.ops.operands import Mlp
from sirius_runtime.spec import Layout
from sirius_runtime.tiers.budget import in_units
from sirius_runtime.tiers.direct_file import DirectFile
from sirius_runtime.tiers.placement import CHOSEN, MOVING, PAGE, Block, Needs, least_room, place
from sirius_runtime.tiers.stream import Load
from tests.support.cli import Cli
from tests.support.families import CONFIGS
from tests.support.fast import gate_but
from tests.support.models import random_decoder, word_tokenizer, write_calibration
from tests.support.tiered import tiered

PROMPTS = [[7, 8, 9], [50, 30, 11, 22, 60]]
WIDE = {"hidden_size": 64, "intermediate_size": 512}
"""Matrices of several pages each."""


@dataclass(frozen=True)
class Kind:
    """How a model is compiled."""

    family: str
    method: str
    weights: str | None
    dtype: str

    def __str__(self) -> str:
        return "-".join(filter(None, (self.family, self.method, self.weights, self.dtype)))


NESTED = Kind("llama", "griffin", "int8", "bfloat16")
FUSED = Kind("phi3", "griffin", None, "bfloat16")  # gate and up are slices of one weight
KINDS = [
    *(NESTED, FUSED),
    Kind("llama", "griffin+teal", "int8", "float32"),
    Kind("gpt2", "griffin", "int8", "float32"),  # biases, and no up
    Kind("llama", "griffin", None, "float32"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    """Compiled models, made when they are first asked for."""
    folder = tmp_path_factory.mktemp("chosen")

    class Files(dict[Kind, Path]):
        def __missing__(self, kind: Kind) -> Path:
            options = CompileConfig(
                sparsity=kind.method,
                calibration=write_calibration(folder / "words.txt"),
                graphs="entries",
                period=4,
                dtype=kind.dtype,
                measure=False,
                **({"weights": kind.weights} if kind.weights else {}),
            )
            sizes = {"n_inner": 512} if kind.family == "gpt2" else WIDE
            model = random_decoder(kind.family, **{**CONFIGS.get(kind.family, {}), **sizes})
            compiled = compile_model(model, options, tokenizer=word_tokenizer())
            self[kind] = compiled.save(folder / f"{kind}.sirius")
            return self[kind]

    return Files()


def runs_of(model: SiriusModel) -> list[str]:
    """The entries that the model runs from now on, and the passes that move rows in."""
    backend, runs = model.backend, []
    assert isinstance(backend, TieredBackend)
    stream = backend.stream
    assert stream is not None
    running = stream.running

    def noted(entry: str) -> object:
        runs.append(entry)
        return running(entry)

    stream.running = noted  # type: ignore[method-assign,assignment]
    return runs


def tokens(
    model: SiriusModel, prompts: Sequence[Sequence[int]], **options: object
) -> Sequence[Sequence[int]]:
    return model.generate(prompts, max_new_tokens=12, fallback=False, **options).tokens  # type: ignore[arg-type]


# the same tokens


@pytest.mark.parametrize("kind", gate_but(KINDS, {NESTED, FUSED}), ids=str)
def test_tokens_with_copied_rows(kind: Kind, files: dict[Kind, Path]) -> None:
    """Of one prompt, of prompts with different choices, and of equal prompts."""
    plain, (model, _) = load(files[kind]), tiered(files[kind], 0.3)
    placement = model.backend.placement  # type: ignore[attr-defined]
    assert placement.bytes_of(CHOSEN) < placement.bytes_of("sparse")
    for prompts in ([PROMPTS[0]], PROMPTS, [PROMPTS[1]] * 2):
        runs = runs_of(model)
        options = {"refresh": 1, "tree_width": len(prompts)}
        assert tokens(model, prompts, **options) == tokens(plain, prompts, **options)
        assert ("sparse" in runs) is (prompts == PROMPTS)
        assert CHOSEN in runs or prompts == PROMPTS  # a row that is left alone has one choice
    sparse = [m.generate(PROMPTS[0], mode="sparse").tokens for m in (model, plain)]
    assert sparse[0] == sparse[1]


def test_without_kernels(files: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIRIUS_KERNELS", "0")
    plain, (model, _) = load(files[NESTED]), tiered(files[NESTED], 0.3)
    assert model.backend.placement.chosen  # type: ignore[attr-defined]
    assert tokens(model, [PROMPTS[1]]) == tokens(plain, [PROMPTS[1]])


def test_a_tier_of_a_gpu_on_a_pretend_device(files: dict[Kind, Path]) -> None:
    plain, (model, _) = load(files[NESTED]), tiered(files[NESTED], 0.3, host=True)
    runs = runs_of(model)
    assert tokens(model, [PROMPTS[1]]) == tokens(plain, [PROMPTS[1]])
    assert CHOSEN in runs


# what is read


def test_rows_are_moved_in_once_a_prompt(
    files: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once a refresh. Drafts stream nothing then, and a dense run moves nothing in."""
    model, _ = tiered(files[NESTED], 0.4)
    placement = model.backend.placement  # type: ignore[attr-defined]
    assert placement.bytes_of("sparse") > 0 == placement.bytes_of(CHOSEN)
    runs = runs_of(model)
    tokens(model, [PROMPTS[0]])
    assert runs.count(MOVING) == 1
    assert runs.count(CHOSEN) > runs.count("full") > 1
    runs.clear()
    tokens(model, [PROMPTS[0]])
    assert MOVING not in runs  # the same choice
    tokens(model, [PROMPTS[1]], mode="exact")
    assert runs.count(MOVING) == 1
    runs.clear()
    model.generate([PROMPTS[0]], mode="full", max_new_tokens=4)
    assert set(runs) == {"prefill", "full"}
    runs.clear()
    tokens(model, [PROMPTS[0]], refresh=1)
    # The choice of the last period is not used.
    assert 1 < runs.count(MOVING) <= runs.count("observe")


def test_bytes_of_a_draft_step_fall(
    files: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is asked of the file: steps of two choices stream what those of one do not."""
    model, _ = tiered(files[NESTED], 0.4)
    read: list[int] = []
    fetch = DirectFile.fetch

    def counted(file: DirectFile, load: Load) -> object:
        read.append(load.needed)
        return fetch(file, load)

    monkeypatch.setattr(DirectFile, "fetch", counted)
    asked = []
    for prompts in ([PROMPTS[0]], PROMPTS):
        read.clear()
        model.generate(prompts, mode="sparse", max_new_tokens=22, eos_token_id=[])
        asked.append(sum(read))
    placement = model.backend.placement  # type: ignore[attr-defined]
    once = placement.bytes_of("prefill") + placement.bytes_of(MOVING) + 2 * placement.ring
    assert asked[0] <= once
    assert asked[1] >= 21 * placement.bytes_of("sparse") > once


# what can go wrong


def test_a_read_error_while_rows_are_moved_in(
    files: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiered(files[NESTED], 0.4)
    right = [tokens(model, [prompt]) for prompt in PROMPTS]
    backend, read = model.backend, os.preadv
    assert isinstance(backend, TieredBackend)
    assert backend.stream is not None
    broken: list[bool] = []

    def preadv(*args: object) -> int:
        if broken:
            raise OSError(errno.EIO, "Input/output error")
        return read(*args)  # type: ignore[arg-type]

    move_in = backend._move_in

    def moving(neurons: Tensor) -> bool:
        assert backend.stream is not None
        backend.stream.close()  # what was read ahead is given up
        broken.append(True)
        try:
            return move_in(neurons)
        finally:
            broken.clear()

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        patch.setattr(backend, "_move_in", moving)
        with pytest.raises(ArtifactError, match="Input/output error"):
            tokens(model, [PROMPTS[0]])
    # Some rows are the old prompt's: none of them is used.
    assert [tokens(model, [prompt]) for prompt in reversed(PROMPTS)] == right[::-1]


# placements


def test_inspect_shows_the_rows(
    files: dict[Kind, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sirius_runtime.backends.tiered.resident", lambda: 0)
    monkeypatch.setattr("sirius_runtime.backends.tiered.reserve", lambda *_: 0)
    path = files[NESTED]
    model, _ = tiered(path, 0.4)
    backend = model.backend
    assert isinstance(backend, TieredBackend)
    budget = backend.placement.memory
    shown = Cli(capsys, monkeypatch).run(
        "inspect", path, "--placement", "--memory-budget", str(budget)
    )
    assert shown.code == 0, shown.err
    placement = place(backend.needs, budget)
    assert f"{in_units(placement.bytes_of(CHOSEN))} per draft step" in shown.out
    assert f"{in_units(placement.bytes_of(MOVING))} per prompt" in shown.out
    row = next(line for line in shown.out.splitlines() if "up_proj.weight, high plane" in line)
    rows = sum(size for block, size in placement.chosen.items() if "up_proj" in block.weight)
    assert rows > 0
    assert f" {in_units(rows)} " in row


def test_a_batch_holds_whole_blocks(files: dict[Kind, Path]) -> None:
    """Its rows choose their own neurons, so their rows of weights are not held."""
    one = load(files[NESTED], memory_budget="4GiB")
    assert one.backend.needs.chosen  # type: ignore[attr-defined]
    several = load(files[NESTED], memory_budget="4GiB", rows=2)
    assert not several.backend.needs.chosen  # type: ignore[attr-defined]


sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8)


@given(sizes, st.integers(0, 100), st.floats(0.0, 31.0))
def test_a_placement_with_rows_fits(
    blocks: list[tuple[int, int]], more: int, drafts: float
) -> None:
    """Blocks and their rows, in pages. What is held whole has no rows; each block is in one place
    for drafts: held, its rows held, or streamed.
    """
    at, found, chosen = 0, [], {}
    for number, (size, rows) in enumerate(blocks):
        found.append(Block(str(number), 0, at, at + size * PAGE))
        chosen[found[-1]] = rows * PAGE
        at += size * PAGE
    steps = tuple((block,) for block in found)
    needs = Needs(
        dict.fromkeys(("full", "sparse", CHOSEN, MOVING), steps),
        frozenset(),
        {"full": 1.0, "sparse": 0.0, CHOSEN: drafts, MOVING: 0.0},
        chosen=chosen,
    )
    room = least_room(needs) + more * PAGE
    placement = place(needs, room)
    assert placement.memory <= room
    left = {name: {b for step in all_of for b in step} for name, all_of in placement.steps.items()}
    rows = placement.chosen.keys()
    assert left["full"] == left["sparse"] == {*found} - placement.held
    assert left[CHOSEN] == left["full"] - rows
    assert left[MOVING] == rows
    assert not rows & placement.held
    for block in rows:
        assert chosen[block] < block.room
    without = Needs(needs.steps, needs.pinned, needs.passes)
    fewest = min(placement.streamed, place(without, room).streamed)
    assert placement.streamed <= fewest + 2 * 9 * PAGE * (drafts + 1)  # at most its last blocks


# the operators over copies


@given(
    st.sampled_from(["float32", "bfloat16", "nested"]),
    st.integers(1, 20).map(lambda n: 32 * n),
    st.integers(0, 2**31),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 5),
)
def test_copies_give_equal_bits(
    kind: str, total: int, seed: int, gated: bool, counts: bool, rows: int, T: int
) -> None:
    """As the whole weights, whichever weights are copies, by kernels and references."""
    draws = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    C = 32 * draws.randint(1, 4)

    def weight(layout: Layout) -> Tensor:
        if kind != "nested":
            return torch.randn(total, C, generator=generator).to(dtype)
        shape = (C, total) if layout is Layout.BY_INPUTS else (total, C)
        return nest(torch.randn(shape, generator=generator), layout)[:1].contiguous()

    mlp = Mlp(
        weight(Layout.BY_OUTPUTS),
        weight(Layout.BY_OUTPUTS) if gated else None,
        weight(Layout.BY_INPUTS),
        *(None, None, None, "silu", 1),
    )
    kept = draws.randint(1, total - 1)
    choice = torch.randperm(total, generator=generator)[:kept].sort().values
    neurons = choice.expand(2, rows, kept).contiguous()
    copied = {}
    for name in ("gate", "up", "down"):
        own = getattr(mlp, name)
        if own is not None and draws.random() < 0.7:
            copied[name] = own.new_empty(chosen_shape(own.shape, kept))
            copy_rows(own, choice, copied[name])
    x = torch.randn(rows, T, C, generator=generator).to(dtype)
    row = OPERATORS["griffin_cats_mlp" if counts else "griffin_mlp"]
    last = (neurons, 0.3) if counts else (neurons,)
    few = mlp._replace(**copied)
    for whole, over in (
        (row.cpu, keeping(row.name, row.keeps, total)),
        (row.reference, spreading(row.reference, total)),
    ):
        assert whole is not None
        wanted, found = whole(x, *mlp, *last), over(x, *few, *last)
        pairs = zip(wanted, found, strict=True) if counts else ((wanted, found),)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_rows_with_other_neurons_are_refused() -> None:
    total, neurons = 64, torch.tensor([[[0, 1], [0, 2]]])
    weights = [torch.randn(2, 32) for _ in range(3)]
    over = keeping("griffin_mlp", ("neurons",), total)
    with pytest.raises(OperandError, match="neurons differ between rows"):
        over(torch.randn(2, 1, 32), *weights, None, None, None, "silu", 0, neurons)
