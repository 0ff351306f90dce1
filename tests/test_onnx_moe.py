"""Mixtures of experts on ONNX Runtime: equal to PyTorch, with weights read in place."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from sirius_compile import CompileConfig, compile_model
from sirius_compile.families import FAMILIES
from sirius_compile.onnx.package import onnx_summary
from sirius_runtime import load
from sirius_runtime.artifact import Artifact
from sirius_runtime.backends.onnx import OnnxBackend
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.onnx_files import export_onnx
from sirius_runtime.ops.moe import EXPERT_ACTIVATIONS
from tests.support.families import random_model, random_rows
from tests.support.fast import slow_but
from tests.support.models import word_tokenizer
from tests.support.onnx import CPU, Pair, load_onnx
from tests.support.onnx_graphs import over_weights, run
from tests.support.operators import EXPERTS, NEURONS, ROUTED, moe_args, sirius

OPERATORS: dict[str, tuple[Any, ...]] = {
    "dense_moe": (),
    "topk_moe": (17,),
    "experts_moe": (2, True),
}
MIXTURES = [family.model_type for family in FAMILIES if "experts" in family.mlp]
ROWS = random_rows(3, 17, 8)


def check(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], weights: dict[str, Tensor]
) -> onnx.ModelProto:
    """Checks that ONNX Runtime equals `function` of inputs and weights; returns the graph."""
    model = over_weights(function, inputs, weights)
    (found,) = run(model, inputs)
    torch.testing.assert_close(found, function(*inputs, **weights), atol=1e-5, rtol=1e-4)
    return model


def stored(args: Sequence[Any], form: str) -> tuple[dict[str, Tensor], Callable[..., list[Any]]]:
    """The stored weights for `moe_args`, and the operator's arguments made from them."""
    gate, up, down, gate_bias, up_bias, down_bias = args[3:9]
    plain = {"gate": gate, "up": up, "down": down}
    plain |= {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    if form == "apart":
        weights = {name: tensor for name, tensor in plain.items() if tensor is not None}
        return weights, lambda **given: [given.get(name) for name in plain]
    both = [(gate, up)] if gate_bias is None else [(gate, up), (gate_bias, up_bias)]
    if form == "fused":
        joined = [torch.cat(pair, 1) for pair in both]
        parts = slice(None, NEURONS), slice(NEURONS, None)
    else:  # alternating
        joined = [torch.stack(pair, 2).flatten(1, 2) for pair in both]
        parts = slice(None, None, 2), slice(1, None, 2)
    weights = dict(zip(("gate_up", "gate_up_bias"), joined, strict=False)) | {"down": down}
    if down_bias is not None:
        weights["down_bias"] = down_bias

    def arguments(**given: Tensor) -> list[Any]:
        rows = [given["gate_up"][:, part] for part in parts]
        own = given.get("gate_up_bias")
        biases = [None if own is None else own[:, part] for part in parts]
        return [*rows, given["down"], *biases, given.get("down_bias")]

    return weights, arguments


FORMS = ("apart", "fused", "alternating")


@pytest.mark.parametrize(
    ("operator", "form", "bias"),
    slow_but(
        product(OPERATORS, FORMS, (False, True)),
        [
            (operator, form, (row + column) % 2 == 0)
            for row, operator in enumerate(OPERATORS)
            for column, form in enumerate(FORMS)
        ],
    ),
)
def test_operators(operator: str, form: str, bias: bool) -> None:
    args = moe_args("clamped_swiglu" if form == "alternating" else "silu", bias=bias)
    inputs, kind, rest = args[:3], args[9:], OPERATORS[operator]
    weights, arguments = stored(args, form)

    def function(x: Tensor, experts: Tensor, w: Tensor, **given: Tensor) -> Tensor:
        return getattr(sirius, operator)(x, experts, w, *arguments(**given), *kind, *rest)

    model = check(function, inputs, weights)
    matrices = [t.name for t in model.graph.initializer if re.fullmatch(r"\w+\[\d\]", t.name)]
    assert len(matrices) == EXPERTS * (3 if form == "apart" else 2)
    gathered = {i for n in model.graph.node if n.op_type == "Gather" for i in n.input}
    assert not gathered & set(matrices)


@pytest.mark.parametrize("act", EXPERT_ACTIVATIONS)
def test_activations(act: str) -> None:
    args = moe_args(act)
    args[0] = 4 * args[0]  # beyond the bounds of clamped_swiglu
    weights, arguments = stored(args, "apart")
    check(lambda *given, **w: sirius.dense_moe(*given, *arguments(**w), act, 0), args[:3], weights)


@pytest.mark.parametrize("operator", OPERATORS)
def test_plain_experts_have_no_up(operator: str) -> None:
    args = moe_args("gelu", bias=True, plain=True)
    weights, arguments = stored(args, "apart")

    def function(x: Tensor, experts: Tensor, w: Tensor, **given: Tensor) -> Tensor:
        rest = ("gelu", 0, *OPERATORS[operator])
        return getattr(sirius, operator)(x, experts, w, *arguments(**given), *rest)

    check(function, args[:3], weights)


@pytest.mark.parametrize("tokens", [1, 3])
def test_experts_that_no_token_goes_to(tokens: int) -> None:
    """One graph serves any number of tokens, also if all go to the same experts or to one twice."""
    args = moe_args(bias=True)
    weights, arguments = stored(args, "fused")
    model = over_weights(
        lambda *given, **w: sirius.dense_moe(*given, *arguments(**w), "silu", 0),
        args[:3],
        weights,
    )
    for chosen in ([4, 0, 1], [2, 2, 2], [0, 1, 2]):
        experts = torch.tensor([chosen] * tokens)
        x, w = args[0][:tokens], args[2][:tokens]
        (found,) = run(model, (x, experts, w))
        wanted = sirius.dense_moe(x, experts, w, *args[3:])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("keep", [1, ROUTED])
def test_the_heaviest_experts(keep: int, normalised: bool) -> None:
    args = moe_args()
    turned = [args[0], args[1].flip(-1), args[2].flip(-1)]
    weights, arguments = stored(args, "apart")

    def function(*given: Tensor, **w: Tensor) -> Tensor:
        return sirius.experts_moe(*given, *arguments(**w), "silu", 0, keep, normalised)

    check(function, turned, weights)


def test_weights_that_are_no_rows_are_refused() -> None:
    args = moe_args()
    weights, arguments = stored(args, "apart")
    weights["down"] = weights["down"].mT.contiguous()

    def function(*given: Tensor, **w: Tensor) -> Tensor:
        w["down"] = w["down"].transpose(1, 2)
        return sirius.dense_moe(*given, *arguments(**w), "silu", 0)

    with pytest.raises(
        UnsupportedModelError, match=r"sirius.dense_moe can't .* stored rows of each expert"
    ):
        over_weights(function, args[:3], weights)


# whole models


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return compiled("mixtral", "experts", tmp_path_factory.mktemp("mixtral"), tree_width=2)


@pytest.mark.gate
def test_mixtral(mixtral: Pair) -> None:
    check_pair(mixtral)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method"),
    [
        (name, method)
        for name, method in product(MIXTURES, ("topk", "experts"))
        if method == "topk" or name not in ("mixtral", "phimoe", "deepseek_v3")
    ],
)
def test_families(family: str, method: str, tmp_path: Path) -> None:
    check_pair(compiled(family, method, tmp_path, tree_width=2))


def check_pair(pair: Pair) -> None:
    for mode in ("sirius", "exact", "sparse", "full"):
        pair.agree(ROWS, mode=mode, eos_token_id=[], max_new_tokens=16)
    with Artifact.open(pair.path) as artifact:
        _, slots = artifact.weight_slots()
        backend = OnnxBackend(artifact, providers=CPU, threads=1, progress=lambda told: None)
        for spec in backend._onnx.graphs.values():
            whole = {name for name in spec.weights if len(slots[name.partition("[")[0]].shape) == 3}
            assert all(name.endswith("]") for name in whole)
            assert not any("[" in name for name in spec.constants)


@pytest.mark.gate
def test_any_runtime_finds_an_expert_in_the_exported_file(
    mixtral: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export_onnx(mixtral.path, tmp_path / "out")
    prompt = "w7 w8 w50 w11"
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "out"), prompt])
    runpy.run_path(str(Path(__file__).parent.parent / "examples" / "onnx_minimal.py"))
    shown = capsys.readouterr().out.split()
    (text,) = mixtral.torch.generate(prompt, mode="exact", max_new_tokens=40).texts or ()
    assert shown[:30] == text.split()[:30]


def compiled(family: str, method: str, folder: Path, **options: Any) -> Pair:
    config = CompileConfig(sparsity=method, period=4, dtype="float32", graphs="both", **options)
    made = compile_model(random_model(family), config, tokenizer=word_tokenizer())
    words = "the experts that it keeps" if method == "experts" else "topk saves no time"
    assert words in onnx_summary(made.spec)
    path = made.save(folder / "mixture.sirius")
    return Pair(path, load(path, device="cpu"), load_onnx(path))
