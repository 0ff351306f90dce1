"""Models in memory: what would be lost in silence is refused by name, and what was captured is run
beside the model.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from sirius_compile import CompileConfig, compile_model
from sirius_compile.capture import capture
from sirius_compile.live import check_model, check_modules, compare
from sirius_runtime.errors import ConfigError, UnsupportedModelError
from tests.support.families import random_model


class Doubled(nn.Linear):
    """A linear that computes something else over the same weights."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Adapted(nn.Module):
    """Stands in for peft's wrapper."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model


Adapted.__module__ = "peft.peft_model"


def with_adapter(model: PreTrainedModel) -> object:
    return Adapted(model)


def with_an_inner_adapter(model: PreTrainedModel) -> object:
    layer = model.model.layers[0].mlp
    layer.up_proj = Adapted(layer.up_proj)
    return model


def with_hook(model: PreTrainedModel) -> object:
    model.model.layers[1].register_forward_hook(lambda module, args, output: output)
    return model


def with_pre_hook(model: PreTrainedModel) -> object:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: None)
    return model


def with_a_weight_in_float64(model: PreTrainedModel) -> object:
    model.model.layers[0].mlp.up_proj.double()
    return model


REFUSED_AT_SIGHT: dict[str, tuple[Callable[[PreTrainedModel], object], str]] = {
    "adapter": (with_adapter, r"Adapted has an adapter \(peft\).*merge_and_unload"),
    "inner adapter": (with_an_inner_adapter, r"has an adapter \(peft\).*merge_and_unload"),
    "hook": (with_hook, r"model\.layers\.1 has a forward hook \(.*\), .*remove it"),
    "pre-hook": (with_pre_hook, r"model\.layers\.1\.mlp has a forward hook"),
    "classifier": (
        lambda model: AutoModelForSequenceClassification.from_config(model.config),
        "LlamaForSequenceClassification does not predict the next token; load .*ForCausalLM",
    ),
    "no head": (lambda model: model.model, "LlamaModel has no language-model head; load"),
    "float64": (lambda model: model.double(), r"is in float64; convert it, model\.to\(torch\.fl"),
    "mixed": (with_a_weight_in_float64, r"up_proj.weight is in float64 and most of .* in float32"),
}


@pytest.mark.parametrize("kind", REFUSED_AT_SIGHT)
def test_refused_at_sight(kind: str) -> None:
    change, match = REFUSED_AT_SIGHT[kind]
    with pytest.raises(UnsupportedModelError, match=match):
        compile_model(change(random_model("llama")))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nn.Linear(2, 2), "a Linear is not a model of transformers; pass a PreTrainedModel"),
        (nn.DataParallel(nn.Linear(2, 2)), r"a DataParallel is not .*; pass its \.module"),
        (7, "a int is not a model of transformers"),
        (None, "a NoneType is not a model of transformers"),
    ],
)
def test_what_is_no_model(model: object, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        compile_model(model)  # type: ignore[arg-type]


def replaced(model: PreTrainedModel) -> None:
    up = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = Doubled(up.in_features, up.out_features, bias=False)


def added(model: PreTrainedModel) -> None:
    model.model.layers[0].extra = nn.Linear(2, 2)


def cut_short(model: PreTrainedModel) -> None:
    model.model.layers = model.model.layers[:1]


def widened(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(torch.zeros(7, 64))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (replaced, r"layers\.0\.mlp\.up_proj is a Doubled, but the config describes a Linear"),
        (added, r"layers\.0\.extra is a Linear, but the config describes none"),
        (cut_short, r"the model has no model\.layers\.1, which its config describes"),
        (widened, r"lm_head\.weight has the shape \[7, 64\], but the config describes \[101, 64\]"),
    ],
)
def test_models_that_are_not_what_their_config_describes(
    change: Callable[[PreTrainedModel], None], match: str
) -> None:
    built, model = random_model("llama"), random_model("llama")
    check_modules(model, built)
    change(model)
    with pytest.raises(UnsupportedModelError, match=match):
        check_modules(model, built)


def test_a_patched_forward_is_found_by_what_it_computes() -> None:
    """The captured graph does not show the patch; a wrapper that computes the same is allowed."""
    model = random_model("llama")
    captured = capture(model.config, live=model)
    weights = dict(model.named_parameters()) | dict(captured.constants)
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x)
    model.train()
    compare(model, captured.program, torch.float32, weights.__getitem__)
    assert all(module.training for module in model.modules()), "as it was"
    mlp.forward = lambda x: 1.01 * own(x)
    with pytest.raises(UnsupportedModelError, match=r"apart|layers\.1\.mlp has a patched forward"):
        compare(model, captured.program, torch.float32, weights.__getitem__)


@pytest.mark.gate
def test_weights_that_are_no_longer_tied_are_found() -> None:
    model = random_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(UnsupportedModelError, match="does not compute what its config and weights"):
        compile_model(model, CompileConfig(sparsity="topk"))


def test_a_model_that_is_right_is_taken() -> None:
    model = random_model("llama")
    assert check_model(model) is model
