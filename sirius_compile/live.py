"""Checks models in memory: refuses models that can't be captured, and compares logits afterwards.

Capture builds its own model from the config. Anything else that changes the computation of the
model in memory (adapters, replaced modules, hooks, patched methods) would be lost silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from sirius_compile.precision import stored
from sirius_passes.program import DENSE, Program
from sirius_passes.testing_runs import run_graph
from sirius_runtime.dtypes import dtype_name, dtype_of
from sirius_runtime.errors import ConfigError, UnsupportedModelError
from sirius_runtime.spec import DType

MERGE = (
    "merge the adapter into the weights with peft's merge_and_unload(), and compile (or save with "
    "save_pretrained) the model that it returns"
)
_TOKENS = 12  # length of the prompt on which logits are compared
_SEED = 0
_FLOATS = tuple(dtype_of(name) for name in DType)
# Products of a layer that round: q, k, v, the scores, o, gate and up, down.
_ROUNDINGS_OF_A_LAYER = 7
_LEAST_TOLERANCE = 1e-4  # sums of thousands of float32 numbers in another order


def check_model(model: Any) -> PreTrainedModel:
    """Returns `model` if it can be captured. Raises ConfigError if it is not a transformers model,
    and UnsupportedModelError, with the reason, if it can't be captured.
    """
    name = type(model).__name__
    if _is_adapted(model):
        raise UnsupportedModelError(f"{name} has an adapter (peft) that is not merged; {MERGE}")
    if not isinstance(model, PreTrainedModel):
        inner = next((a for a in ("module", "_orig_mod") if hasattr(model, a)), None)
        remedy = f"pass its .{inner}" if inner else "pass a PreTrainedModel, a directory or a name"
        raise ConfigError(f"a {name} is not a model of transformers; {remedy}")
    _check_kind(model, name)
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(f"{name} is quantised; load it without a quantization_config")
    for path, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        if any(hooks):
            hook = next(iter((hooks[0] or hooks[1]).values()))
            what = getattr(hook, "__qualname__", type(hook).__name__)
            raise UnsupportedModelError(
                f"{path or name} has a forward hook ({what}), which would be lost; remove it (with "
                "its handle's remove()), and put its effect into the weights"
            )
    main = main_dtype(model)
    if main not in _FLOATS:
        raise UnsupportedModelError(
            f"{name} is in {dtype_name(main)}; convert it, model.to(torch.float32)"
        )
    for path, tensor in stored(model):
        if tensor.is_floating_point() and tensor.dtype not in (main, torch.float32):
            raise UnsupportedModelError(
                f"{path} is in {dtype_name(tensor.dtype)} and most of {name} in "
                f"{dtype_name(main)}; convert the model to one dtype, "
                f"model.to(torch.{dtype_name(main)})"
            )
    return model


def main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of a model's parameters, counted by element."""
    counts: dict[torch.dtype, int] = {}
    for _, tensor in stored(model):
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def check_modules(model: nn.Module, built: nn.Module) -> None:
    """Raises UnsupportedModelError if `model` differs in modules, weights or shapes from `built`,
    the model that its config describes.
    """
    expected = dict(built.named_modules())
    for path, module in model.named_modules():
        other = expected.pop(path, None)
        if other is None or not _alike(module, other, is_root=not path):
            wanted = "none" if other is None else f"a {type(other).__name__}"
            raise UnsupportedModelError(
                f"{path or 'the model'} is a {type(module).__name__}, but the config describes "
                f"{wanted}: a replaced module can't be captured. Compile the model as transformers "
                "builds it, with the change put into its weights"
            )
    if expected:
        raise UnsupportedModelError(
            f"the model has no {next(iter(expected))}, which its config describes; correct "
            "model.config"
        )
    found = dict(stored(model))
    for path, tensor in stored(built):
        shape = None if path not in found else tuple(found[path].shape)
        if shape != tuple(tensor.shape):
            has = "is not there" if shape is None else f"has the shape {list(shape)}"
            raise UnsupportedModelError(
                f"{path} {has}, but the config describes {list(tensor.shape)}; correct model.config"
            )


def compare(
    model: PreTrainedModel,
    program: Program,
    dtype: torch.dtype,
    weight: Callable[[str], Tensor],
) -> None:
    """Compares the captured graph, run in `dtype` on the CPU, with the model, over a short prompt.

    `weight`: gives a weight's values by name. Raises UnsupportedModelError if the logits [T, V]
    differ by more than rounding explains: each product of a layer adds an independent error of the
    coarser dtype's last bit to the hidden state. The median token's distance counts, because
    rounding may route single tokens to another expert. Does nothing if a weight has no storage.
    """
    if any(t.is_meta or isinstance(t, FakeTensor) for _, t in stored(model)):
        return
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(model.config.vocab_size, (1, _TOKENS), generator=generator)
    given = {"input_ids": ids, "positions": torch.arange(_TOKENS)[None]}
    weights = {
        name: weight(name).to("cpu", dtype if spec.retype else dtype_of(spec.dtype))
        for name, spec in program.weights.items()
    }
    ours = run_graph(program.graphs[DENSE], given, weights, dtype)["logits"]
    del weights
    with torch.no_grad(), _evaluating(model):
        ids = ids.to(model.device)
        mask = torch.ones_like(ids)
        live = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.cpu()
    live, ours = live[0].float(), ours[0].float()
    scale = live.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    distance = float(((ours - live).norm(dim=-1) / scale).nanmedian())
    eps = max(torch.finfo(dtype).eps, torch.finfo(main_dtype(model)).eps)
    rounding = 2 * eps * math.sqrt(_ROUNDINGS_OF_A_LAYER * program.state.layers)
    if distance <= max(rounding, _LEAST_TOLERANCE):
        return
    patched = [path for path, module in model.named_modules() if "forward" in vars(module)]
    cause = f"{patched[0]} has a patched forward" if patched else "something changes its forward"
    raise UnsupportedModelError(
        f"{type(model).__name__} does not compute what its config and weights describe: over "
        f"{_TOKENS} tokens, its logits differ from the captured graph's by a relative error of "
        f"{distance:.2g} ({cause}); compile the model as transformers builds it"
    )


def _check_kind(model: PreTrainedModel, name: str) -> None:
    expected = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    if getattr(model.config, "text_config", None) is not None:
        raise UnsupportedModelError(
            f"{name} is multimodal; save it by save_pretrained and give that directory, from which "
            "the text model is compiled"
        )
    if expected is None or isinstance(model, expected):
        return
    if re.search(r"For[A-Z]", name):
        raise UnsupportedModelError(
            f"{name} does not predict the next token; load the model by AutoModelForCausalLM"
        )
    raise UnsupportedModelError(
        f"{name} has no language-model head; load the model by AutoModelForCausalLM"
    )


def _is_adapted(model: Any) -> bool:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(type(module).__module__.split(".")[0] == "peft" for module in modules)


def _alike(module: nn.Module, other: nn.Module, is_root: bool) -> bool:
    kind, wanted = type(module), type(other)
    if kind is wanted or (is_root and isinstance(module, wanted)):
        return True
    # Compared by name, because a model's own code may have been imported twice.
    return (kind.__module__, kind.__qualname__) == (wanted.__module__, wanted.__qualname__)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A context in evaluation mode; restores each module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
