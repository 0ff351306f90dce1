"""Impossible values in a model's files are refused by name, before anything is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sirius_compile import CompileConfig, compile_model
from sirius_compile.capture import Wanted
from sirius_compile.checkpoint import Checkpoint, open_weights
from sirius_compile.config_check import check_token_ids, check_weights, read_generation_config
from sirius_compile.models import ModelSource, load_config, resolve_model
from sirius_compile.texts import MAX_TOKENS, PREFIX, read_prompts, read_windows
from sirius_compile.tokenizer import tokenizer_files
from sirius_runtime.artifact_writer import ArtifactWriter
from sirius_runtime.errors import (
    ArtifactError,
    CalibrationError,
    ConfigError,
    ModelNotFoundError,
    SiriusError,
    UnsupportedModelError,
)
from tests.support.artifacts import program_of
from tests.support.families import random_model, small_config
from tests.support.models import word_tokenizer

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    random_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A model's own copy of its files."""
    own = tmp_path / "model"
    own.mkdir()
    for file in saved.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    return own


def source_of(folder: Path) -> ModelSource:
    return ModelSource(folder, "a-model", None, False)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps as nan; it must be a finite number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps as -1e-05; it must be at least 0"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
            "rope_theta as inf; it must be a finite number",
        ),
        ({"max_position_embeddings": -5}, "max_position_embeddings as -5; .* at least 2"),
        ({"max_position_embeddings": 1}, "max_position_embeddings as 1; .* at least 2"),
        ({"num_hidden_layers": 0}, "num_hidden_layers as 0; .* at least 1"),
        ({"vocab_size": -1}, "vocab_size as -1; .* at least 1"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta as 0"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}},
            "factor as -2.0; it must be a number above 0",
        ),
    ],
)
def test_values_of_config_json(folder: Path, changes: dict[str, object], match: str) -> None:
    rewrite(folder / "config.json", **changes)
    with pytest.raises(UnsupportedModelError, match=rf"a-model: config\.json gives {match}"):
        load_config(source_of(folder))


@pytest.mark.parametrize(
    ("content", "match"),
    [(DEEP, "nested too deeply"), ("{", "Expecting"), ("[]", "holds a JSON list"), ("\0", "")],
)
def test_config_json_that_is_none(folder: Path, content: str, match: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelNotFoundError, match=rf"config\.json .*{match}.*; download the model"):
        load_config(source_of(folder))


@pytest.mark.parametrize("content", ["{", "[]", DEEP, "7"])
def test_generation_config_that_is_none(folder: Path, content: str) -> None:
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ModelNotFoundError, match=r"generation_config\.json .*; fix it, or remove"):
        read_generation_config(folder, small_config("llama"), "a-model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "x"),
        ("eos_token_id", [[2]]),
        ("eos_token_id", 2.5),
        ("eos_token_id", True),
    ],
)
def test_token_ids_that_are_none(folder: Path, key: str, value: object) -> None:
    rewrite(folder / "generation_config.json", **{key: value})
    config = load_config(source_of(folder))
    with pytest.raises(UnsupportedModelError, match=rf"generation_config\.json.*{key}"):
        check_token_ids(read_generation_config(folder, config, "a-model"), config, "a-model")


def test_a_list_of_end_tokens_is_taken(folder: Path) -> None:
    rewrite(folder / "generation_config.json", eos_token_id=[2, 3])
    config = load_config(source_of(folder))
    check_token_ids(read_generation_config(folder, config, "a-model"), config, "a-model")


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("tokenizer.json", b"{", r"tokenizer\.json can't be read by this version"),
        ("tokenizer.json", b"{}", r"tokenizer\.json can't be read by this version"),
        ("tokenizer.json", DEEP.encode(), r"tokenizer\.json can't be read by this version"),
        ("tokenizer_config.json", b"[]", r"can't read its tokenizer .*save it again"),
        ("tokenizer_config.json", DEEP.encode(), r"can't read its tokenizer .*save it again"),
        ("tokenizer_config.json", b"{}", r"can't read its tokenizer .*save it again"),
    ],
)
def test_tokenizers_that_are_none(folder: Path, file: str, content: bytes, match: str) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=match):
        tokenizer_files(source_of(folder))


# weights


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("value", "dtype", "match"),
    [
        (float("nan"), torch.float32, "holds NaN"),
        (float("-inf"), torch.float32, "holds infinity"),
        (
            98304.0,
            torch.float16,
            "holds 98304, which is out of the range of float16; use --dtype",
        ),
    ],
)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none(
    value: float, dtype: torch.dtype, match: str, stored: torch.dtype
) -> None:
    weights = {"sound": torch.ones(3, 5).to(stored), "ids": torch.ones(2, dtype=torch.int64)}
    weights["bad"] = torch.ones(4, 6).to(stored).mT
    names = [(name, dtype) for name in ("sound", "ids", "bad")]
    check_weights(iter(names), weights.__getitem__, "a-model")
    weights["bad"][2, 1] = value
    with pytest.raises(
        UnsupportedModelError, match=f"a-model: its weight bad {match.split(',')[0]}"
    ):
        check_weights(iter(names), weights.__getitem__, "a-model")


def test_nan_in_a_checkpoint_is_found_when_it_is_compiled(folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    change_weights(folder, lambda tensors: tensors[name][3, 4:5].fill_(float("nan")))
    with pytest.raises(UnsupportedModelError, match=rf"{name} holds NaN"):
        compile_model(folder, CompileConfig(sparsity="topk"))


def opened(folder: Path) -> list[str]:
    """Opens a checkpoint's weights; returns the warnings."""
    warnings: list[str] = []
    config = load_config(source_of(folder))
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    wanted = Wanted({name: tuple(t.shape) for name, t in state.items()}, {}, frozenset(state))
    open_weights(source_of(folder), config, wanted, warnings.append)
    return warnings


def test_fewer_layers_than_the_checkpoint_has(folder: Path) -> None:
    rewrite(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(
        UnsupportedModelError, match=r"of layer 1, but config\.json gives .* 1 layer"
    ):
        opened(folder)


def test_an_adapter_among_the_weights(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    change_weights(folder, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    with pytest.raises(UnsupportedModelError, match=rf"holds {name}, .* adapter.*merge_and_unl"):
        opened(folder)


def test_tensors_without_a_place_are_named(folder: Path) -> None:
    assert opened(folder) == []
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"  # as older checkpoints hold it
    change_weights(folder, lambda t: t.update({old: torch.ones(2), "score.weight": torch.ones(2)}))
    assert opened(folder) == ["a-model holds tensors that the model does not use: score.weight"]


def test_an_adapter_beside_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UnsupportedModelError, match=r"holds an adapter .* beside its weights.*move .*--adapter"
    ):
        resolve_model(folder)


def test_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(
        ModelNotFoundError, match=r"holds an adapter .* but no model; give the model"
    ):
        resolve_model(tmp_path)
    assert resolve_model(tmp_path, adapters=True).directory == tmp_path


@pytest.mark.parametrize(
    "file", [7, None, [], "", "a\0b", "/etc/passwd", "../model.safetensors", "x/../../y"]
)
def test_an_index_may_not_leave_its_folder(folder: Path, file: object) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFoundError, match=r"lm_head\.weight is in .*, which is not a file"):
        Checkpoint(folder)


@pytest.mark.parametrize("content", [DEEP, "[]", '{"weight_map": 7}', '{"weight_map": [1]}'])
def test_an_index_that_is_none(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelNotFoundError, match=r"index\.json .*; download or save"):
        Checkpoint(folder)


# calibration and graphs


@pytest.mark.parametrize(
    "line", ['{"text": 5}', '{"text": null}', '{"text": "\\ud800"}', "[]", "{", "7", DEEP]
)
def test_calibration_lines_that_are_none(tmp_path: Path, line: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "a\u2028b"}}\n\n{line}\n')
    with pytest.raises(CalibrationError, match=r"line 3: expected a JSON object with text"):
        read_windows(path, word_tokenizer().backend_tokenizer, 64)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_calibration_file_is_read_no_further_than_it_is_used(tmp_path: Path, suffix: str) -> None:
    """Its end is not text, so a reader of the whole file would refuse it."""
    tokenizer = word_tokenizer().backend_tokenizer
    line = " ".join(f"w{6 + i % 90}" for i in range(50)) + " "
    given = json.dumps({"text": line}) + "\n" if suffix == ".jsonl" else line
    count = 2 * MAX_TOKENS // 50 if suffix == ".jsonl" else 2 * PREFIX // len(line)
    path = tmp_path / f"text{suffix}"
    path.write_bytes(given.encode() * count + b"\xff")
    found = read_windows(path, tokenizer, 512)
    ids = [token for sample in found for token in sample.tokens]
    assert ids == (tokenizer.encode(line).ids * count)[:MAX_TOKENS]
    assert len(ids) == MAX_TOKENS
    path.write_bytes(given.encode() + b"\xff")
    with pytest.raises(CalibrationError, match="can't be read as UTF-8 text"):
        read_windows(path, tokenizer, 512)


@pytest.mark.parametrize("content", [b"", b'{"text": "x"}', b"\xff"])
def test_a_models_own_prompts_that_are_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "calibration_prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(CalibrationError):
        read_prompts(path)


@pytest.mark.parametrize("name", ["file", "file/within", "a\0b"])
def test_graphs_are_dumped_into_folders(folder: Path, name: str) -> None:
    (folder / "file").touch()
    with pytest.raises(ConfigError, match=r"--dump-graphs .*the folder can.t be created"):
        compile_model(folder, dump_graphs=folder / name)


# what is written is read


def test_what_can_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    tensors = {"x": torch.ones(2)}
    program = program_of(tensors)
    seen: list[Path] = []

    def refuse(path: Path) -> None:
        seen.append(path)
        raise ArtifactError("graph: node 'x' has the unknown op")

    def write(check: Callable[[Path], None], **changes: Any) -> None:
        with ArtifactWriter(tmp_path / "model.sirius", force=True) as writer:
            writer.add_weights(program.weights, lambda spec: tensors[spec.name])
            writer.finish(program, check)

    write(lambda path: None)
    before = (tmp_path / "model.sirius").read_bytes()
    with pytest.raises(SiriusError, match=r"is not written: .*unknown op.*; please report this"):
        write(refuse)
    assert seen
    assert [p.name for p in tmp_path.iterdir()] == ["model.sirius"]
    assert (tmp_path / "model.sirius").read_bytes() == before
