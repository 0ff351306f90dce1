"""Finding models by name, directory and hub id, and refusals before any weight is read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import transformers.dynamic_module_utils
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoConfig

from sirius_compile import models
from sirius_compile.models import (
    SHORT_NAMES,
    ModelSource,
    load_config,
    resolve_model,
    shipped_models,
)
from sirius_runtime.errors import ConfigError, ModelNotFoundError, UnsupportedModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
REPOSITORY = [
    ".gitattributes",
    "README.md",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "modeling_own.py",
    "onnx/model.safetensors",
    "original/params.json",
    "assets/config.json",
    "additional_chat_templates/rag.jinja",
]


def write_model(directory: Path, config: object = LLAMA, *weights: str) -> Path:
    """A model's directory, whose weights are empty files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name in weights:
        (directory / name).touch()
    return directory


def source_of(config: object, directory: Path, *, trusted: bool = False) -> ModelSource:
    return ModelSource(write_model(directory, config), "a-model", None, trusted)


class Hub:
    """Stands in for `snapshot_download`; remembers what it was asked for."""

    def __init__(self, cache: Path, error: Exception | None = None) -> None:
        self._cache, self._error = cache, error
        self.weights: tuple[str, ...] = ("model.safetensors",)
        self.asked: dict[str, Any] = {}

    def __call__(self, repo_id: str, **asked: Any) -> str:
        self.asked = {"repo_id": repo_id, **asked}
        if self._error is not None:
            raise self._error
        return str(write_model(self._cache / "snapshots" / COMMIT, LLAMA, *self.weights))

    def fetched(self) -> set[str]:
        """The files of `REPOSITORY` that the requested patterns match."""
        allowed, ignored = self.asked["allow_patterns"], self.asked["ignore_patterns"]
        return set(filter_repo_objects(REPOSITORY, allow_patterns=allowed, ignore_patterns=ignored))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub(tmp_path / "cache")
    monkeypatch.setattr(models, "snapshot_download", hub)
    return hub


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package that ships one model, `pebble-1m`."""
    monkeypatch.setattr(models, "_SHIPPED_FOLDER", tmp_path / "shipped")
    return write_model(tmp_path / "shipped" / "pebble-1m", LLAMA, "model.safetensors")


def test_short_names_are_lower_case_and_lead_to_one_hub_id_each() -> None:
    assert all(name == name.lower() and "/" not in name for name in SHORT_NAMES)
    assert all(hub_id.count("/") == 1 for hub_id in SHORT_NAMES.values())
    assert len(set(SHORT_NAMES.values())) == len(SHORT_NAMES)


# ---------------------------------------------------------------- names and directories


def test_a_shipped_name(shipped: Path) -> None:
    (shipped.parent / "no-model").mkdir()
    assert shipped_models() == {"pebble-1m": shipped}
    # Nothing that is shipped needs code of its own.
    assert resolve_model("pebble-1m", trust_remote_code=True) == ModelSource(
        shipped, "pebble-1m", None, False
    )


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_directory(tmp_path: Path, as_type: Callable[[Path], str | Path]) -> None:
    directory = write_model(tmp_path / "mine", LLAMA, "model.safetensors")
    assert resolve_model(as_type(directory), trust_remote_code=True) == ModelSource(
        directory, str(directory), None, True
    )


def test_a_directory_comes_before_the_short_name_that_it_bears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "llama-3-8b", LLAMA, "model.safetensors")
    assert resolve_model("llama-3-8b").directory == Path("llama-3-8b")


def test_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_model(tmp_path / "mine", LLAMA, "model.safetensors.index.json")
    assert resolve_model("~/mine").directory == tmp_path / "mine"


@pytest.mark.parametrize(
    "name", ["./no-such", "../no-such", "/no/such", "~/no-such", "a/b/c", "no-such/"]
)
def test_a_path_that_leads_nowhere_is_not_asked_of_the_hub(name: str, hub: Hub) -> None:
    with pytest.raises(ModelNotFoundError, match=r"does not exist; give the directory"):
        resolve_model(name)
    assert not hub.asked


def test_a_path_object_is_never_a_hub_id(hub: Hub) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        resolve_model(Path("meta-llama/Llama-3.2-1B"))
    assert not hub.asked


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ModelNotFoundError, match=r"is a file; give the directory"):
        resolve_model(str(file))


def test_a_directory_without_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        resolve_model(tmp_path)


class Trap:
    """Unpickling this leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self._mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_no_pickle_is_loaded(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "unpickled"
    directory = write_model(tmp_path / "mine")
    (directory / name).write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(ModelNotFoundError, match=rf"\({name}\), and pickled weights are not"):
        resolve_model(directory)
    assert not mark.exists()


def test_weights_under_another_name_are_not_guessed(tmp_path: Path) -> None:
    write_model(tmp_path, LLAMA, "weights.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"neither model\.safetensors nor .*: convert it"):
        resolve_model(tmp_path)


def test_weights_are_needed_only_where_they_are_asked_for(tmp_path: Path) -> None:
    assert resolve_model(write_model(tmp_path), weights=False).directory == tmp_path


def test_a_revision_of_something_local_is_refused(shipped: Path) -> None:
    for model in ("pebble-1m", shipped):
        with pytest.raises(ConfigError, match="--revision main applies to models from the hub"):
            resolve_model(model, revision="main")


# ---------------------------------------------------------------- names that are unknown


def test_an_unknown_name_lists_the_near_ones(shipped: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("Llama-3-8b-instrct")
    message = str(caught.value)
    assert "did you mean llama-3-8b-instruct, " in message
    for form in ("a shipped model (pebble-1m)", "a directory", "organisation/name", "short name"):
        assert form in message
    with pytest.raises(ModelNotFoundError, match=r"did you mean pebble-1m\?"):
        resolve_model("peble-1m")


def test_an_unknown_name_with_none_near(hub: Hub) -> None:
    with pytest.raises(ModelNotFoundError, match=r"there is no model 'xyzzy'; give a shipped"):
        resolve_model("xyzzy")
    assert not hub.asked


# ---------------------------------------------------------------- the hub


@pytest.mark.parametrize("name", ["llama-3.2-1b", "Llama-3.2-1B", "meta-llama/Llama-3.2-1B"])
def test_short_names_and_hub_ids_are_fetched(hub: Hub, tmp_path: Path, name: str) -> None:
    source = resolve_model(name, revision="main", cache_dir=tmp_path)
    assert source.name == hub.asked["repo_id"] == "meta-llama/Llama-3.2-1B"
    assert (hub.asked["revision"], hub.asked["cache_dir"]) == ("main", tmp_path)
    assert source.revision == COMMIT
    assert source.directory.name == COMMIT


def test_only_what_is_read_is_fetched(hub: Hub) -> None:
    resolve_model("org/name")
    plain = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert hub.fetched() == plain
    resolve_model("org/name", trust_remote_code=True)
    assert hub.fetched() == plain | {"modeling_own.py"}
    resolve_model("org/name", weights=False)
    assert hub.fetched() == {name for name in plain if not name.endswith(".safetensors")}


def test_a_repository_without_safetensors(hub: Hub) -> None:
    hub.weights = ()
    with pytest.raises(ModelNotFoundError, match=r"org/name has neither model\.safetensors"):
        resolve_model("org/name")


def http(kind: type[HfHubHTTPError], message: str = "no") -> HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=403)
    return kind(message, response=response)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            http(GatedRepoError),
            ["gated", "meta-llama/Lama-3.2-1B is gated", "HF_TOKEN"],
        ),
        (
            http(RepositoryNotFoundError),
            ["no model", "private", "no such directory", "did you mean meta-llama/Llama-3.2-1B"],
        ),
        (http(RevisionNotFoundError), ["no revision 'v9'", "branches, tags or commits"]),
        (http(DisabledRepoError, "it is\ndisabled"), ["refused", "it is disabled", "HF_TOKEN"]),
        (HFValidationError("bad chars"), ["neither a directory nor a hub id", "bad chars"]),
        (
            caused(LocalEntryNotFoundError("no"), OfflineModeIsEnabled("offline")),
            ["HF_HUB_OFFLINE is set", "hf download meta-llama/Lama-3.2-1B", "give its directory"],
        ),
        (OfflineModeIsEnabled("offline"), ["HF_HUB_OFFLINE is set", "give its directory"]),
        (
            caused(LocalEntryNotFoundError("no"), http(HfHubHTTPError, "504 timeout")),
            ["can't be reached", "504 timeout", "hf download"],
        ),
        (ConnectionError("no route"), ["can't be reached", "no route", "hf download"]),
        (OSError(28, "No space left on device"), ["could not be fetched", "No space left"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_fault_of_the_hub_has_its_remedy(
    error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "snapshot_download", Hub(tmp_path, error))
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("meta-llama/Lama-3.2-1B", revision="v9")
    message = str(caught.value)
    assert "meta-llama/Lama-3.2-1B" in message
    assert [word for word in words if word not in message] == []
    assert caught.value.__cause__ is error


def test_offline_without_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's own library, told to stay offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="not in the cache and HF_HUB_OFFLINE is set"):
        resolve_model("qwen3-0.6b", cache_dir=tmp_path)


def test_offline_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--Qwen--Qwen3-0.6B"
    directory = write_model(repository / "snapshots" / COMMIT, LLAMA, "model.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert resolve_model("qwen3-0.6b", cache_dir=tmp_path) == ModelSource(
        directory, "Qwen/Qwen3-0.6B", COMMIT, False
    )


def test_a_name_that_no_hub_id_may_have(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="neither a directory nor a hub id"):
        resolve_model("an organisation/and a name?", cache_dir=tmp_path)


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {"model_type": "llama"},
        {"model_type": "llama", "architectures": ["LlamaModel"]},
        {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        # A type that transformers knows needs none of the code that its repository still carries.
        {"model_type": "phi3", "auto_map": {"AutoModelForCausalLM": "own.Phi3ForCausalLM"}},
    ],
    ids=lambda config: f"{config['model_type']}-{len(config)}",
)
def test_decoders_are_taken(config: dict[str, Any], tmp_path: Path) -> None:
    assert load_config(source_of(config, tmp_path)).model_type == config["model_type"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "t5"}, r"\(model type 't5'\) is an encoder-decoder"),
        ({"model_type": "bart"}, r"\(model type 'bart'\) is an encoder-decoder"),
        ({"model_type": "bert"}, r"\(model type 'bert'\) is an encoder \(is_decoder is false"),
        ({"model_type": "vit"}, r"\(model type 'vit'\) has no causal language model"),
        ({"model_type": "qwen2_vl"}, r"'qwen2_vl'\) is multimodal.*model type 'qwen2_vl_text'"),
        ({"model_type": "llama", "auto_map": [1]}, r"config\.json gives auto_map as \[1\]"),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            r"is a LlamaForSequenceClassification, which does not predict",
        ),
        (
            {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "own.Model"}},
            r"only in its own code; pass --trust-remote-code",
        ),
        ({"model_type": "llamba"}, r"transformers does not know model type 'llamba'"),
        (
            {"model_type": "llamba", "auto_map": {"AutoConfig": "own.Config"}},
            r"model type 'llamba'\) needs code of its repository.*--trust-remote-code",
        ),
        ({**LLAMA, "hidden_size": "wide"}, r"can't read its config\.json \(.*hidden_size"),
        ({**LLAMA, "dtype": "float17"}, r"can't read its config\.json \(.*float17"),
    ],
    ids=lambda value: str(value.get("model_type")) if isinstance(value, dict) else "",
)
def test_what_is_no_decoder_of_text_is_refused_by_name(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        load_config(source_of(config, tmp_path))
    assert "a-model" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}', "\xff"])
def test_a_config_that_is_none(text: str, tmp_path: Path) -> None:
    source = source_of(LLAMA, tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ModelNotFoundError, match=r"config\.json (can't be read|holds a JSON|has no model_type)"
    ):
        load_config(source)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_models_own_code_runs_only_when_trusted(
    trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    mark = tmp_path / "ran"
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    source = source_of({"model_type": "own", "auto_map": auto_map}, tmp_path / "m", trusted=trusted)
    (source.directory / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PretrainedConfig\n"
        f"Path({str(mark)!r}).touch()\n"
        "class OwnConfig(PretrainedConfig):\n"
        "    model_type = 'own'\n"
    )
    if trusted:
        assert type(load_config(source)).__name__ == "OwnConfig"
    else:
        with pytest.raises(UnsupportedModelError, match="pass --trust-remote-code"):
            load_config(source)
    assert mark.exists() is trusted


def test_transformers_is_told_not_to_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal above is our own check. In addition, transformers is told not to run code."""
    asked: dict[str, Any] = {}
    real = AutoConfig.from_pretrained

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.update(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", watched)
    load_config(source_of(LLAMA, tmp_path))
    assert asked["trust_remote_code"] is False
