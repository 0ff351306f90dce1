"""The compiler reports wrong kernels, and accepts correct ones."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_compile import CompileConfig, compile_model, self_check
from sirius_compile.operator_check import compare, relative_error, tolerance
from sirius_compile.self_check import agree
from sirius_runtime.backends import rewrite
from sirius_runtime.errors import KernelError
from sirius_runtime.kernels import native
from sirius_runtime.kernels.native import references
from tests.support.families import CONFIGS
from tests.support.fast import slow_but
from tests.support.kernels import require_compiler
from tests.support.models import METHODS, random_decoder, word_tokenizer, write_calibration
from tests.support.operators import mlp_args, randn

TYPES = ["float32", "bfloat16", "float16"]
sirius = torch.ops.sirius


@pytest.fixture(autouse=True)
def _compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every compilation checks."""
    require_compiler()
    monkeypatch.setattr("sirius_compile.compile.check_kernels", self_check.check_kernels)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("text") / "words.txt", 64)


def stages(text: Path, family: str = "llama", **options: Any) -> list[str]:
    """Compiles a tiny model; returns the names of its stages."""
    told: list[str] = []
    compile_model(
        random_decoder(family, **CONFIGS.get(family, {})),
        CompileConfig(calibration=text, **{"graphs": "entries", **options}),
        tokenizer=word_tokenizer(),
        progress=lambda stage, seconds: told.append(stage),
    )
    return told


SOUND = [
    (family, method, dtype)
    for family, methods in {
        "llama": METHODS,
        "gemma2": ("topk",),  # attention's scores are bounded
        "mixtral": ("topk", "experts"),
        "gpt_oss": ("experts",),
    }.items()
    for method in methods
    for dtype in TYPES
]
GATE = {("mixtral", "topk", "float16"), ("llama", "griffin+teal", "bfloat16")}


@pytest.mark.parametrize(
    ("family", "method", "dtype"),
    slow_but(SOUND, (), GATE),
)
def test_no_operator_of_a_sound_compile_is_found_wrong(
    family: str, method: str, dtype: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreed = []

    def looked_at(found: Tensor, wanted: Tensor, cosine: float) -> bool:
        agreed.append(agree(found, wanted, cosine))
        return False  # every operator of every run is compared

    monkeypatch.setattr(self_check, "agree", looked_at)
    refresh = 1 if "griffin" in method else 0
    told = stages(text, family, sparsity=method, dtype=dtype, keep=0.5, refresh=refresh)
    assert "check kernels" in told
    assert len(agreed) == 4 + bool(refresh)
    routed = family in ("mixtral", "gpt_oss")  # where rounding may choose another expert
    assert all(agreed) or (routed and dtype != "float32")


def wrong_in(
    monkeypatch: pytest.MonkeyPatch, name: str, when: Callable[..., bool] = lambda *_: True
) -> None:
    """Makes the operator's kernel leave the last quarter of its columns zero."""
    own = dict(rewrite._functions())

    def broken(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def wrong(*args: Any) -> Any:
            result = kernel(*args)
            if not native.switched_off() and when(*args):
                first = result[0] if isinstance(result, tuple) else result
                first[..., -(first.shape[-1] // 4) :] = 0
            return result

        return wrong

    changed = {k: broken(v) if v.__name__ == name else v for k, v in own.items()}
    assert changed != own
    monkeypatch.setattr(rewrite, "_functions", lambda: changed)


def transposed_of_one(x: Tensor, weight: Tensor, *_: Any) -> bool:
    """A regression found at a real model's sizes."""
    return weight.stride(1) != 1 and x.shape[1] == 1


ALWAYS = lambda *_: True  # noqa: E731
WRONG = [
    ("linear", "teal", "full, tokens 1,", transposed_of_one),
    ("topk_mlp", "topk", "sparse, tokens 1,", ALWAYS),
    ("cats_mlp", "cats", "sparse, tokens 1,", ALWAYS),
    ("griffin_mlp", "griffin", "sparse, tokens 1,", ALWAYS),
    ("griffin_cats_mlp", "griffin+teal", "sparse, tokens 1,", ALWAYS),
    ("sparse_linear", "teal", "sparse, tokens 1,", ALWAYS),
    ("dense_mlp_statistic", "griffin", "prefill, tokens 40,", ALWAYS),
    ("dense_mlp", "none", "prefill, tokens 40,", ALWAYS),
    ("cached_attention_by_tokens", "none", "prefill, tokens 40,", ALWAYS),
    ("experts_moe", "experts", "sparse, tokens 1,", ALWAYS),
    ("dense_moe", "experts", "prefill, tokens 40,", ALWAYS),
]


@pytest.mark.parametrize(
    ("name", "method", "where", "when"),
    [pytest.param(*one, marks=() if i < 2 else pytest.mark.slow) for i, one in enumerate(WRONG)],
)
def test_a_wrong_kernel_stops_the_compile_and_is_named(
    name: str,
    method: str,
    where: str,
    when: Callable[..., bool],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong_in(monkeypatch, name, when)
    with pytest.raises(KernelError) as raised:
        stages(
            text,
            "mixtral" if "moe" in name else "llama",
            sparsity=method if name != "dense_mlp" else "topk",
            dtype="bfloat16",
        )
    said = str(raised.value)
    assert said.startswith(f"the CPU kernel of {name}")
    if name != "cached_attention_by_tokens":
        assert f"{name} of model.layers.0." in said
    for part in (f"entry {where}", "relative error", "SIRIUS_KERNELS=0", "bfloat16"):
        assert part in said


@pytest.mark.gate
def test_wrong_numbers_of_nested_weights_stop_the_compile(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The references get the numbers of nested weights from a kernel."""
    right = self_check.unnest

    def wrong(weight: Tensor, *args: Any, **options: Any) -> Tensor | None:
        plain = right(weight, *args, **options)
        if plain is not None:
            plain[-1, -1] += 1
        return plain

    options = {"sparsity": "topk", "weights": "int8"}
    assert "check kernels" in stages(text, **options)
    monkeypatch.setattr(self_check, "unnest", wrong)
    with pytest.raises(KernelError, match="nested weights to numbers is wrong"):
        stages(text, **options)


def test_the_attention_of_a_period_s_graph_is_compared(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = self_check.block_attention

    @functools.wraps(right)
    def wrong(*args: Any) -> Any:
        out, *new = right(*args)
        return (out if native.switched_off() else out * 1.5, *new)

    monkeypatch.setattr(self_check, "block_attention", wrong)
    assert "check kernels" in stages(text, sparsity="none", graphs="entries")
    with pytest.raises(KernelError, match=r"^the CPU kernel of block_attention differs .* full"):
        stages(text, sparsity="griffin", period=4, graphs="torch")


def test_without_kernels_there_is_nothing_to_say(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with references():
        assert "check kernels" not in stages(text, sparsity="none")
    whole = {"sparsity": "griffin", "period": 4, "graphs": "onnx"}
    assert "check kernels" not in stages(text, **whole)
    monkeypatch.setattr(native, "_loaded", {None: None})  # no compiler was found
    assert "check kernels" not in stages(text, sparsity="none")


@pytest.mark.gate
def test_weights_are_held_for_a_layer_and_no_longer(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[weakref.ref[Tensor]] = []
    most: list[int] = []
    fetch = self_check._Weights.get

    def counted(self: Any, name: str) -> Tensor:
        found = fetch(self, name)
        fetched.append(weakref.ref(found))
        most.append(len({id(own) for ref in fetched if (own := ref()) is not None}))
        return found

    monkeypatch.setattr(self_check._Weights, "get", counted)
    model = random_decoder("llama", num_hidden_layers=6)
    compile_model(model, CompileConfig(sparsity="griffin", graphs="entries"))
    assert 4 <= max(most) <= 14  # of 59: the embedding, and those of about a layer


# Comparing


def test_logits_agree_but_for_rounding() -> None:
    wanted = randn(3, 50, seed=0)
    assert agree(wanted, wanted, 0.9999)
    assert agree(wanted * 1.001, wanted, 0.9999)
    for change in (lambda x: x[:, -5:].zero_(), lambda x: x[1:2].neg_()):
        found = wanted.clone()
        change(found)
        assert not agree(found, wanted, 0.98)
    # One token's likeliest is another, by a single column that hardly turns the whole.
    found = torch.cat([wanted, randn(3, 5000, seed=1).clamp(max=2)], 1)
    other = found.clone()
    other[0, 7] = found.max() + 1
    assert torch.cosine_similarity(found, other, dim=-1).min() > 0.99
    assert not agree(other, found, 0.9999)
    assert agree(torch.zeros(1, 4), torch.zeros(1, 4), 0.98)


def test_what_has_no_number_is_not_compared() -> None:
    wanted = randn(2, 8, seed=0)
    wanted[0, 0] = float("nan")
    found = wanted.clone()
    found[0] = 1
    assert agree(found, wanted, 0.9999)
    assert relative_error(found, wanted) == 0
    found[1, 0] = float("nan")
    assert not agree(found, wanted, 0.9999)
    assert relative_error(found, wanted) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wrong_block_is_more_than_rounding(dtype: torch.dtype) -> None:
    wanted = randn(2, 4864, seed=0, dtype=dtype)
    assert relative_error(wanted * (1 + tolerance(dtype) / 4), wanted) < tolerance(dtype)
    found = wanted.clone()
    found[1, 32:64] = 0  # one task of a kernel
    assert relative_error(found, wanted) > tolerance(dtype)


def tied() -> list[Any]:
    """Arguments of an MLP with equal gates, so every score is at the selection's border."""
    x, gate, *rest = mlp_args(dtype=torch.bfloat16, tokens=1)
    return [x[:1], gate[:1].expand_as(gate).contiguous(), *rest]


@pytest.mark.parametrize("name", ["topk_mlp", "cats_mlp"])
def test_a_tie_at_the_border_is_no_error(name: str) -> None:
    arguments, operator = tied(), getattr(sirius, name).default
    x, gate = arguments[:2]
    edge = float(torch.nn.functional.silu(x @ gate[:1].t()).abs())
    for seed in range(8):
        chosen = torch.randperm(13, generator=torch.Generator().manual_seed(seed))[:4]
        with references():
            y = sirius.griffin_mlp(*arguments, chosen.expand(2, 1, 4))
        found = y if name == "topk_mlp" else (y, torch.tensor([4]))
        assert compare(operator, [*arguments, 4 if name == "topk_mlp" else edge], found).right
        # Where nothing is at the border, a choice of four is wrong.
        assert not compare(operator, [*arguments, 13 if name == "topk_mlp" else -1.0], found).right
