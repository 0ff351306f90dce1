"""Checkpoints: mapped if possible, otherwise loaded by transformers; no weight is made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from sirius_compile import checkpoint as checkpoint_module
from sirius_compile.capture import Wanted
from sirius_compile.checkpoint import Checkpoint, WeightSource, checkpoint_dtype, open_weights
from sirius_compile.models import INDEX_FILE, SINGLE_FILE, ModelSource, load_config
from sirius_runtime.errors import ModelNotFoundError, UnsupportedModelError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj.weight"
TIED = {EMBEDDING: (HEAD,)}


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=31,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def saved(model: LlamaForCausalLM, directory: Path, *, shard: str = "1GB") -> ModelSource:
    model.save_pretrained(directory, max_shard_size=shard)
    return ModelSource(directory, "a-model", None, False)


def needed(model: LlamaForCausalLM) -> dict[str, tuple[int, ...]]:
    """The weights that a graph reads: each parameter once, tied ones under their first name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def rewrite(source: ModelSource, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes the tensors of a single-file checkpoint."""
    tensors = load_file(source.directory / SINGLE_FILE)
    change(tensors)
    save_file(tensors, source.directory / SINGLE_FILE, metadata={"format": "pt"})


def rewrite_config(source: ModelSource, **changes: object) -> PretrainedConfig:
    path = source.directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return load_config(source)


def assert_weights(weights: WeightSource, model: LlamaForCausalLM) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(weights.get(name), parameter), name
        assert weights.dtype(name) == parameter.dtype


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes loading a model a failure: the weights must be mapped."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(checkpoint_module.AutoModelForCausalLM, "from_pretrained", refuse)


# ---------------------------------------------------------------- Checkpoint


@pytest.mark.parametrize("shard", ["1GB", "4KB"])
def test_a_checkpoint_tells_of_its_tensors(tmp_path: Path, shard: str) -> None:
    model = llama(dtype=torch.bfloat16)
    checkpoint = Checkpoint(saved(model, tmp_path, shard=shard).directory)
    assert (tmp_path / INDEX_FILE).exists() is (shard == "4KB")
    assert set(checkpoint.names()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == torch.bfloat16
        assert torch.equal(checkpoint.get(name), tensor)


def test_tensors_are_mapped_not_copied(tmp_path: Path) -> None:
    checkpoint = Checkpoint(saved(llama(), tmp_path).directory)
    first, again = checkpoint.get(UP), checkpoint.get(UP)
    assert first.data_ptr() == again.data_ptr()
    # All tensors of a file lie in its one mapping.
    span = (tmp_path / SINGLE_FILE).stat().st_size
    assert abs(checkpoint.get(EMBEDDING).data_ptr() - first.data_ptr()) < span


def test_the_single_file_comes_before_an_index(tmp_path: Path) -> None:
    source = saved(llama(), tmp_path)
    (tmp_path / INDEX_FILE).write_text("stale")
    (tmp_path / "consolidated.safetensors").write_text("of another tool")
    assert UP in Checkpoint(source.directory).names()


def first_shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[0]


def cut_short(directory: Path) -> None:
    path = first_shard(directory)
    path.write_bytes(path.read_bytes()[:-100])


def emptied(directory: Path) -> None:
    first_shard(directory).write_bytes(b"")


def lose_a_shard(directory: Path) -> None:
    first_shard(directory).unlink()


def lose_a_tensor(directory: Path) -> None:
    path = first_shard(directory)
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def index_is_no_json(directory: Path) -> None:
    (directory / INDEX_FILE).write_text("{")


def index_is_a_list(directory: Path) -> None:
    (directory / INDEX_FILE).write_text("[]")


def index_maps_nothing(directory: Path) -> None:
    (directory / INDEX_FILE).write_text('{"metadata": {}}')


def index_maps_oddly(directory: Path) -> None:
    (directory / INDEX_FILE).write_text('{"weight_map": {"a": 3, "b": "c"}}')


def lose_the_index(directory: Path) -> None:
    (directory / INDEX_FILE).unlink()
    (directory / "pytorch_model.bin").touch()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut_short, r"model-00001-of-\d+\.safetensors is cut short or damaged"),
        (emptied, r"model-00001-of-\d+\.safetensors is cut short or damaged"),
        (lose_a_shard, r"lacks model-00001-of-\d+\.safetensors, which .*index\.json lists"),
        (lose_a_tensor, r"model-00001-of-\d+\.safetensors lacks \S+, which .*index\.json lists"),
        (index_is_no_json, r"index\.json can't be read \(Expecting property"),
        (index_is_a_list, r"index\.json holds a JSON list instead of an object"),
        (index_maps_nothing, r"index\.json is not an index of safetensors \(KeyError"),
        (index_maps_oddly, r"index\.json says that a is in 3, which is not a file in this folder"),
        (lose_the_index, r"neither model\.safetensors nor model\.safetensors\.index\.json"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    harm: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    source = saved(llama(), tmp_path, shard="4KB")
    harm(tmp_path)
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        Checkpoint(source.directory)
    assert "download or save the model again" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# ---------------------------------------------------------------- open_weights


def opened(
    source: ModelSource,
    config: PretrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, tuple[str, ...]],
) -> WeightSource:
    names = frozenset([*shapes, *(name for others in aliases.values() for name in others)])
    return open_weights(source, config, Wanted(shapes, aliases, names))


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("shard", ["1GB", "4KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_mapped_without_a_model(tmp_path: Path, shard: str, tied: bool) -> None:
    model = llama(tied=tied, dtype=torch.bfloat16)
    source = saved(model, tmp_path, shard=shard)
    weights = opened(source, load_config(source), needed(model), TIED if tied else {})
    assert_weights(weights, model)
    assert weights.get(UP).data_ptr() == weights.get(UP).data_ptr()


@pytest.mark.usefixtures("no_loading")
def test_a_tied_weight_may_stand_under_its_other_name(tmp_path: Path) -> None:
    model = llama(tied=True)
    source = saved(model, tmp_path)
    rewrite(source, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    assert_weights(opened(source, load_config(source), needed(model), TIED), model)


@pytest.mark.usefixtures("no_loading")
def test_a_tied_weight_may_stand_under_both_names(tmp_path: Path) -> None:
    model = llama(tied=True)
    source = saved(model, tmp_path)
    rewrite(source, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert_weights(opened(source, load_config(source), needed(model), TIED), model)


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    model = llama(tied=True)
    source = saved(model, tmp_path)
    rewrite(source, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}))
    with pytest.raises(UnsupportedModelError, match=rf"ties {EMBEDDING} and {HEAD}.*to false"):
        opened(source, load_config(source), needed(model), TIED)


def test_names_that_only_transformers_resolves(tmp_path: Path) -> None:
    """The names of a base model's weights lack the prefix `model.`."""
    model = llama(tied=True, dtype=torch.bfloat16)
    model.model.save_pretrained(tmp_path)
    source = ModelSource(tmp_path, "a-model", None, False)
    assert UP not in Checkpoint(tmp_path).names()
    weights = opened(source, load_config(source), needed(model), TIED)
    assert_weights(weights, model)


def test_a_missing_weight_is_never_made_up(tmp_path: Path) -> None:
    """transformers fills weights that a checkpoint lacks with random numbers."""
    model = llama()
    model.model.save_pretrained(tmp_path)
    source = ModelSource(tmp_path, "a-model", None, False)
    with pytest.raises(UnsupportedModelError, match=rf"a-model: .* holds no {HEAD} .*\[31, 16\]"):
        opened(source, load_config(source), needed(model), {})


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    model = llama()
    source = saved(model, tmp_path)
    config = rewrite_config(source, intermediate_size=32)
    wanted = needed(LlamaForCausalLM(config))
    with pytest.raises(UnsupportedModelError, match=r"proj\.weight and 3 more .*\[32, 16\]"):
        opened(source, config, wanted, {})


def test_what_transformers_cannot_load_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(llama(), tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("conversion failed")

    monkeypatch.setattr(checkpoint_module.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(UnsupportedModelError, match=r"a-model: .*\(conversion failed\)"):
        opened(source, load_config(source), {"other.weight": (1,)}, {})


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_configs(tmp_path: Path, dtype: torch.dtype) -> None:
    source = saved(llama(dtype=dtype), tmp_path)
    assert checkpoint_dtype(source, load_config(source)) == dtype


def test_without_one_in_the_config_most_weights_decide(tmp_path: Path) -> None:
    source = saved(llama(dtype=torch.bfloat16), tmp_path)
    rewrite(source, lambda tensors: tensors.update(steps=torch.arange(3), norm=torch.ones(3)))
    config = rewrite_config(source, dtype=None)
    assert config.dtype is None
    assert checkpoint_dtype(source, config) == torch.bfloat16


def test_the_older_name_of_the_dtype(tmp_path: Path) -> None:
    source = saved(llama(), tmp_path)
    path = tmp_path / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "dtype"}
    path.write_text(json.dumps({**config, "torch_dtype": "float16"}))
    assert checkpoint_dtype(source, load_config(source)) == torch.float16


def test_a_quantised_config_is_refused(tmp_path: Path) -> None:
    source = saved(llama(), tmp_path)
    config = rewrite_config(source, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"a-model is quantised .*the unquantised"):
        checkpoint_dtype(source, config)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(UP, torch.int8), (UP, torch.float8_e4m3fn), (UP.replace("weight", "qweight"), torch.int32)],
)
def test_quantised_weights_are_refused(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source = saved(llama(), tmp_path)
    rewrite(source, lambda tensors: tensors.update({name: torch.ones(24, 16).to(dtype)}))
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=rf"{name} is stored as \w+\); compile the unq"):
        checkpoint_dtype(source, config)


def test_other_kinds_of_number_are_refused(tmp_path: Path) -> None:
    source = saved(llama(dtype=torch.float64), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"in float64; convert it to one of float32"):
        checkpoint_dtype(source, load_config(source))
