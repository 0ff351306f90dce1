"""Finds a model by a shipped name, a directory, a short name or a hub id."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from sirius_compile.config_check import check_config, read_object
from sirius_compile.text_model import is_causal, text_config
from sirius_runtime.errors import ConfigError, ModelNotFoundError, UnsupportedModelError, shown

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
"""save_pretrained's names for weights in one file, and for the index of several files."""

_SHIPPED_FOLDER = Path(__file__).parent / "shipped"
_CONFIG_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
# Leaves out gigabytes that are not read: folders of other formats (onnx/, original/, runs/), and
# `consolidated` files, which hold the same weights under the publisher's names. The only folder
# fetched is additional_chat_templates, matched by "add".
_NEVER_FETCHED = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTERS = ("adapter_config.json", "adapter_model*")
_REMOTE_CODE = "pass --trust-remote-code if you have read that code and trust it"
_CAUSAL_LM = "AutoModelForCausalLM"

SHORT_NAMES: dict[str, str] = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3-70b-instruct": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "gemma-3-1b-it": "google/gemma-3-1b-it",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-360m-instruct": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "smollm2-1.7b-instruct": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "olmo-2-1b": "allenai/OLMo-2-0425-1B",
    "olmo-2-7b": "allenai/OLMo-2-1124-7B",
    "granite-3.3-2b": "ibm-granite/granite-3.3-2b-base",
    "granite-3.3-2b-instruct": "ibm-granite/granite-3.3-2b-instruct",
}
"""Short name → hub id."""


@dataclass(frozen=True)
class ModelSource:
    """A model's directory on this machine, and its origin.

    `name`, for messages: the shipped name, the hub id, or the directory as given. `revision`: the
    commit, for a model from the hub.
    """

    directory: Path
    name: str
    revision: str | None
    trust_remote_code: bool


def shipped_models() -> dict[str, Path]:
    """The models in this package: name → directory."""
    return {path.parent.name: path.parent for path in sorted(_SHIPPED_FOLDER.glob("*/config.json"))}


def is_name(model: Any) -> bool:
    """Whether `model` is a name or a path, which `resolve_model` takes."""
    return isinstance(model, str | Path)


def resolve_model(
    model: str | Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    adapters: bool = False,
) -> ModelSource:
    """Finds `model`: a shipped name, a directory, a short name, or a hub id, in this order. With
    `adapters`, it may also be an adapter.

    Only configuration, tokenizer and safetensors are fetched from the hub (HF_TOKEN and the cache
    are honoured), and Python files only with `trust_remote_code`. Without `weights`, weights are
    neither required nor fetched. Raises ModelNotFoundError, with the remedy, if there is no such
    model, and ConfigError for a `revision` of a model that is not from the hub.
    """
    name = str(model)
    shipped, path = shipped_models(), _local(model)
    if name in shipped:
        _check_no_revision(name, revision)
        return ModelSource(shipped[name], name, None, False)
    if path.is_dir():
        _check_no_revision(name, revision)
        _check_files(path, name, weights=weights, adapters=adapters)
        return ModelSource(path, name, None, trust_remote_code)
    if path.exists() or isinstance(model, Path) or _is_path(name):
        fault = "is a file" if path.exists() else "does not exist"
        raise ModelNotFoundError(
            f"model {name!r} {fault}; give the directory that save_pretrained wrote (config.json "
            "and safetensors), or a .gguf file"
        )
    hub_id = SHORT_NAMES.get(name.lower(), name)
    if "/" not in hub_id:
        raise ModelNotFoundError(_unknown(name, shipped))
    patterns = [
        *_CONFIG_FILES,
        *(["*.safetensors"] if weights else []),
        *(["*.py"] if trust_remote_code else []),
    ]
    directory = _fetch(hub_id, revision, cache_dir, patterns)
    _check_files(directory, hub_id, weights=weights, adapters=adapters)
    # The hub's cache names a revision's folder by its commit.
    return ModelSource(directory, hub_id, directory.name, trust_remote_code)


def load_config(source: ModelSource) -> PretrainedConfig:
    """The model's config; for a multimodal model, the config of its text model.

    Runs code of the model's repository only if the source is trusted. Raises UnsupportedModelError,
    with the model type, if the model is not a text decoder, needs such code, is unknown to the
    installed transformers, or has a value out of its range. Raises ModelNotFoundError if
    config.json can't be read.
    """
    config = whole_config(source)
    text = text_config(config)
    reason = _refusal(config, source.trust_remote_code)
    if reason is None and text is not None:
        reason = _text_refusal(text)
    if reason is not None:
        raise UnsupportedModelError(f"{source.name} (model type {config.model_type!r}) {reason}")
    check_config(text or config, source.name)
    return text or config


def whole_config(source: ModelSource) -> PretrainedConfig:
    """Like `load_config`, but for any kind of model, and with a multimodal model's whole config."""
    raw = _read_config(source.directory / "config.json")
    _check_known(source, raw)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source.directory, trust_remote_code=source.trust_remote_code
        )
    except Exception as error:  # bad values may raise any exception in transformers
        raise UnsupportedModelError(
            f"{source.name}: transformers can't read its config.json ({_summary(error)}); compare "
            "it with the original model's"
        ) from error
    return config


def _local(model: str | Path) -> Path:
    """`model` as a path. Raises ModelNotFoundError for a path that the system can't look up."""
    try:
        path = Path(model)
        if str(model).startswith("~"):  # a Path drops a leading ./
            path = path.expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelNotFoundError(
            f"model {shown(str(model))} can't be looked up ({reason}); give a shipped model, a "
            "directory or a hub id"
        ) from error
    return path


def _check_no_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise ConfigError(
            f"--revision {revision} applies to models from the hub, but {name} is on this machine; "
            "leave --revision out"
        )


def _is_path(name: str) -> bool:
    """Whether a name can only be a path; `a/b` is a hub id unless there is such a directory."""
    return name.startswith((".", "~", os.sep)) or name.endswith("/") or name.count("/") > 1


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter but no model."""
    return bool(_adapters(directory)) and not (directory / "config.json").is_file()


def _adapters(directory: Path) -> list[Path]:
    return [file for kind in _ADAPTERS for file in sorted(directory.glob(kind))]


def _check_files(directory: Path, name: str, *, weights: bool, adapters: bool) -> None:
    if adapters and is_adapter(directory):
        return
    _check_no_adapter(directory, name)
    if not (directory / "config.json").is_file():
        raise ModelNotFoundError(
            f"{name} has no config.json, so it is not a transformers model; give a directory that "
            "save_pretrained wrote, or the hub id of such a model"
        )
    if not weights or any((directory / file).is_file() for file in (SINGLE_FILE, INDEX_FILE)):
        return
    pickles = sorted(p.name for kind in _PICKLES for p in directory.glob(kind))
    found = (
        f"its weights are pickled ({pickles[0]}), and pickled weights are not loaded; "
        if pickles
        else ""
    )
    raise ModelNotFoundError(
        f"{name} has neither {SINGLE_FILE} nor {INDEX_FILE}: {found}convert it to safetensors "
        "(if you trust it: load it with transformers, then save_pretrained) and give that directory"
    )


def _check_no_adapter(directory: Path, name: str) -> None:
    """Refuses an adapter beside a model, as transformers applies it only if peft is installed."""
    if not (found := _adapters(directory)):
        return
    if is_adapter(directory):
        raise ModelNotFoundError(
            f"{name} holds an adapter ({found[0].name}) but no model; give the model that the "
            "adapter was trained on"
        )
    raise UnsupportedModelError(
        f"{name} holds an adapter ({found[0].name}) beside its weights; move the adapter to its "
        "own folder, and give that folder with --adapter to merge it"
    )


def _unknown(name: str, shipped: Mapping[str, Path]) -> str:
    near = difflib.get_close_matches(name.lower(), [*shipped, *SHORT_NAMES], n=4, cutoff=0.5)
    meant = f"did you mean {', '.join(near)}? Give" if near else "give"
    here = ", ".join(shipped) or "none"
    return (
        f"there is no model {name!r}; {meant} a shipped model ({here}), a directory, a hub id "
        "(organisation/name), or a short name such as llama-3-8b"
    )


def _fetch(hub_id: str, revision: str | None, cache_dir: Path | None, patterns: list[str]) -> Path:
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=patterns,
                ignore_patterns=_NEVER_FETCHED,
            )
        )
    except Exception as error:  # releases of huggingface_hub raise different HTTP errors
        raise ModelNotFoundError(_hub_fault(error, hub_id, revision)) from error


def _hub_fault(error: Exception, hub_id: str, revision: str | None) -> str:
    """What the user can do about an error of the hub."""
    elsewhere = f"download it on a connected machine (hf download {hub_id}) and give its directory"
    cause = error.__cause__ or error
    if isinstance(error, GatedRepoError):
        return (
            f"{hub_id} is gated: accept its licence on its page on the hub, then set HF_TOKEN to a "
            "token of that account"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{hub_id} has no revision {revision!r}; give one of its branches, tags or commits"
    if isinstance(error, RepositoryNotFoundError):
        near = difflib.get_close_matches(hub_id, SHORT_NAMES.values(), n=3, cutoff=0.7)
        meant = f" (did you mean {', '.join(near)}?)" if near else ""
        return (
            f"the hub has no model {hub_id!r}, or it is private, and there is no such directory: "
            f"check the spelling{meant}, or set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, HFValidationError):
        return f"{hub_id!r} is neither a directory nor a hub id ({_summary(error)})"
    if isinstance(cause, OfflineModeIsEnabled):
        return f"{hub_id} is not in the cache and HF_HUB_OFFLINE is set: unset it, or {elsewhere}"
    if isinstance(error, LocalEntryNotFoundError | ConnectionError):
        return (
            f"{hub_id} is not in the cache and the hub can't be reached ({_summary(cause)}): try "
            f"again later, or {elsewhere}"
        )
    if isinstance(error, HfHubHTTPError):
        return f"the hub refused {hub_id} ({_summary(error)}); check HF_TOKEN, or {elsewhere}"
    return f"{hub_id} could not be fetched ({_summary(error)}); try again, or {elsewhere}"


def _summary(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _read_config(path: Path) -> dict[str, Any]:
    raw = read_object(path, "download the model again")
    if not isinstance(raw.get("model_type"), str):
        raise ModelNotFoundError(
            f"{path} has no model_type, so it is not the config of a transformers model; give the "
            "directory that save_pretrained wrote"
        )
    return raw


def _check_known(source: ModelSource, raw: Mapping[str, Any]) -> None:
    """Refuses a type that needs the model's own code, unless that code was trusted."""
    model_type, auto_map = raw["model_type"], raw.get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise UnsupportedModelError(
            f"{source.name}: config.json gives auto_map as {auto_map!r:.80}; it must be an object"
        )
    if model_type in CONFIG_MAPPING or (source.trust_remote_code and "AutoConfig" in auto_map):
        return
    if auto_map:
        raise UnsupportedModelError(
            f"{source.name} (model type {model_type!r}) needs code of its repository, which is not "
            f"run by default; {_REMOTE_CODE}"
        )
    raise UnsupportedModelError(
        f"{source.name}: the installed transformers does not know model type {model_type!r}; a "
        "newer version may"
    )


def _text_refusal(text: PretrainedConfig) -> str | None:
    """Why the text model of a multimodal model can't be compiled; None if it may be."""
    what = f"is multimodal, and its text model (model type {text.model_type!r})"
    if text.is_encoder_decoder:
        return f"{what} is an encoder-decoder; only decoders are supported"
    if not is_causal(text):
        return f"{what} has no causal language model of its own in transformers"
    return None


def _refusal(config: PretrainedConfig, trusted: bool) -> str | None:
    """Why a model is not a decoder that can be compiled; None if it may be one."""
    own_code = _CAUSAL_LM in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder:
        return "is an encoder-decoder; only decoders are supported"
    if text_config(config) is not None:
        return None  # its text model is compiled, whatever the whole model is
    if own_code and trusted:
        return None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        remedy = f", only in its own code; {_REMOTE_CODE}" if own_code else ""
        return f"has no causal language model in transformers{remedy}"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_decoder:
        return "is an encoder (is_decoder is false in its config.json); only decoders are supported"
    heads = config.architectures or []
    if heads and all(re.search(r"For(?!CausalLM)[A-Z]", head) for head in heads):
        return f"is a {heads[0]}, which does not predict the next token; only causal models do"
    return None
