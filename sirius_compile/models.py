"""Where a model comes from: a shipped name, a directory, a short name or a hub id."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sirius_runtime.errors import ModelNotFoundError, UnsupportedModelError

_SHIPPED_FOLDER = Path(__file__).parent / "shipped"
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]

SHORT_NAMES = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3-70b-instruct": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
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
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "olmo-2-1b": "allenai/OLMo-2-0425-1B",
    "olmo-2-7b": "allenai/OLMo-2-1124-7B",
    "granite-3.3-2b": "ibm-granite/granite-3.3-2b-base",
}
"""Short name → hub id."""


@dataclass(frozen=True)
class ModelSource:
    """A model's directory on this machine, and where it is from.

    `name` is what to call it: the shipped name, the hub id, or the directory. `revision`: the commit,
    for one from the hub.
    """

    directory: Path
    name: str
    revision: str | None
    trust_remote_code: bool


def shipped_models() -> dict[str, Path]:
    """The models inside this package: name → directory."""
    return {path.parent.name: path.parent for path in sorted(_SHIPPED_FOLDER.glob("*/config.json"))}


def resolve_model(
    model: str | Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> ModelSource:
    """Finds `model`: a shipped name, a directory, a short name, or a hub id, in this order.

    From the hub (HF_TOKEN and the cache are honoured) only configuration, tokenizer and safetensors
    are fetched, and Python files only with `trust_remote_code`. Raises ModelNotFoundError, with the
    remedy, where it leads nowhere.
    """
    name = str(model)
    shipped = shipped_models()
    if name in shipped:
        return ModelSource(shipped[name], name, None, False)
    path = Path(model)
    if path.is_dir():
        return ModelSource(_checked_directory(path), str(path), None, trust_remote_code)
    if path.exists() or isinstance(model, Path) or name.startswith((".", "~", os.sep)):
        fault = "is a file, not a directory" if path.exists() else "does not exist"
        raise ModelNotFoundError(
            f"model {name!r} {fault}; give the directory that save_pretrained wrote (config.json and "
            "safetensors)"
        )
    hub_id = SHORT_NAMES.get(name.lower(), name)
    if hub_id.count("/") != 1:
        raise ModelNotFoundError(_unknown(name, [*shipped, *SHORT_NAMES]))
    patterns = [*_FILES, "*.py"] if trust_remote_code else _FILES
    with _explained(hub_id, revision):
        directory = Path(
            snapshot_download(
                hub_id, revision=revision, cache_dir=cache_dir, allow_patterns=patterns
            )
        )
    # The hub's cache keeps each revision in a folder named by its commit.
    return ModelSource(_checked_directory(directory), hub_id, directory.name, trust_remote_code)


def load_config(source: ModelSource) -> PretrainedConfig:
    """The model's configuration; runs no code of the model's repository unless it was trusted.

    Raises UnsupportedModelError for a model that is not a causal decoder, or that needs such code.
    """
    try:
        config = AutoConfig.from_pretrained(
            source.directory, trust_remote_code=source.trust_remote_code
        )
    except (ValueError, OSError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        remedy = (
            "pass --trust-remote-code if you trust that repository's code"
            if "trust_remote_code" in str(error)
            else "it may need a newer transformers"
        )
        raise UnsupportedModelError(f"{source.name}: {first}; {remedy}") from error
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{source.name} ({config.model_type}) is an encoder-decoder; only decoders are supported"
        )
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not remote:
        raise UnsupportedModelError(
            f"{source.name}: model type {config.model_type!r} has no causal language model in "
            "transformers"
        )
    return config


def _checked_directory(path: Path) -> Path:
    if not (path / "config.json").exists():
        raise ModelNotFoundError(
            f"{path} holds no config.json, so it is not a model; give the directory that "
            "save_pretrained wrote"
        )
    if not list(path.glob("*.safetensors")):
        pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in path.glob(kind))
        reason = (
            f"only pickled weights ({pickles[0]}), which are never loaded" if pickles else "no weights"
        )
        raise ModelNotFoundError(
            f"{path} holds {reason}; convert them to safetensors: load the model with transformers "
            "where you trust it, and save_pretrained it"
        )
    return path


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.5)
    meant = f"did you mean {', '.join(near)}? " if near else ""
    return (
        f"no model is called {name!r}; {meant}Give a shipped model ({', '.join(shipped_models())}), a "
        f"directory, a hub id (organisation/name), or a short name such as {', '.join(known[-3:])}"
    )


@contextmanager
def _explained(hub_id: str, revision: str | None) -> Iterator[None]:
    """Turns the hub's errors into what the user can do about them."""
    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{hub_id} is gated: accept its licence on its page on the hub, then set HF_TOKEN to a "
            "token of that account"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{hub_id} has no revision {revision!r}; give a branch, tag or commit of it"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"the hub has no model {hub_id!r}, or it is private: check the spelling, or set HF_TOKEN"
        ) from error
    except HFValidationError as error:
        raise ModelNotFoundError(f"{hub_id!r} is not a hub id ({error})") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, OSError) as error:
        raise ModelNotFoundError(
            f"{hub_id} is not in the local cache and the hub can't be reached (HF_HUB_OFFLINE is set, "
            "or there is no network); download it where there is one and give its directory"
        ) from error
    except HfHubHTTPError as error:
        raise ModelNotFoundError(f"the hub refused {hub_id}: {error}") from error
