"""Adapters (LoRA and others), merged into the weights of their base model by peft."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from sirius_compile.config_check import read_object
from sirius_compile.models import ModelSource
from sirius_runtime.errors import ModelNotFoundError, UnsupportedModelError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_AGAIN = "save the adapter again with peft's save_pretrained"


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder. `kind`: its type in peft. `base`: the model that it was trained on, by
    the name in its config; None if the config has none.
    """

    folder: Path
    kind: str
    base: str | None


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter's config. Raises ModelNotFoundError if the folder holds no adapter in
    safetensors, and UnsupportedModelError if it is not for a causal language model.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise ModelNotFoundError(f"{folder} holds no {ADAPTER_CONFIG}; give an adapter's folder")
    config = read_object(path, _AGAIN)
    kind, task, base = (
        config.get(key) for key in ("peft_type", "task_type", "base_model_name_or_path")
    )
    if not isinstance(kind, str):
        raise ModelNotFoundError(f"{path} has no peft_type; {_AGAIN}")
    if task not in (None, "CAUSAL_LM"):
        raise UnsupportedModelError(
            f"{folder} is an adapter for {task}; only adapters of causal language models can be "
            "merged"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelNotFoundError(
            f"{folder} has no {ADAPTER_WEIGHTS}, and pickled weights are not loaded; {_AGAIN}"
        )
    return Adapter(folder, kind, base if isinstance(base, str) and base else None)


def merged(base: ModelSource, adapter: Adapter) -> PreTrainedModel:
    """The base model with the adapter merged into its weights. Raises UnsupportedModelError, with
    peft's reason, for an adapter that can't be merged.
    """
    if find_spec("peft") is None:
        raise UnsupportedModelError(
            f"{adapter.folder}: merging an adapter needs peft: pip install peft"
        )
    from peft import PeftModel
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuners = {getattr(kind, "value", kind): one for kind, one in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    if not hasattr(tuners.get(adapter.kind), "merge_and_unload"):  # prompt tuning, unknown types
        raise UnsupportedModelError(
            f"{adapter.folder} is an adapter of type {adapter.kind}, which peft can't merge into "
            "weights"
        )
    model = _load(base)
    try:
        adapted: Any = PeftModel.from_pretrained(model, adapter.folder, use_safetensors=True)
        # safe_merge: layers that peft can't merge, and weights that become NaN, raise an error.
        whole: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # bad files may raise any exception in peft
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnsupportedModelError(
            f"{adapter.folder} ({adapter.kind}) can't be merged into {base.name} ({reason:.300}); "
            "check that it was trained on this model"
        ) from error
    return whole.eval()


def _load(base: ModelSource) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base.directory,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=base.trust_remote_code,
        )
    except Exception as error:  # as above
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnsupportedModelError(
            f"{base.name}: transformers can't load its weights ({reason:.300}); download or save "
            "the model again"
        ) from error
    return model
