"""Specs to JSON and back: the same value, or an error that names the field."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sirius_runtime.errors import ArtifactError
from sirius_runtime.spec import (
    FORMAT_VERSION,
    JSON,
    DType,
    EntrySpec,
    FileRecord,
    Manifest,
    Method,
    ModelSpec,
    PassRecord,
    PeriodSpec,
    ProgramSpec,
    SiteSpec,
    SparsitySpec,
    StateSpec,
    TensorSpec,
    ToolVersions,
    WeightSpec,
    from_json,
    to_json,
)
from tests.support.json_values import json_values, places

PROGRAM = ProgramSpec(
    model=ModelSpec("org/model", "abc123", "llama", DType.BFLOAT16, 32, 64, 1234),
    entries=(
        EntrySpec(
            "full",
            (TensorSpec("input_ids", "int64", ("B", "T")),),
            (TensorSpec("logits", "model", ("B", "T", 32)),),
        ),
        EntrySpec("sparse", (), ()),
    ),
    weights=(
        WeightSpec("embed", "bfloat16", (32, 8)),
        WeightSpec("down", "bfloat16", (12, 8), transposed=True),
        WeightSpec("inv_freq", "float32", (4,), retype=False),
        WeightSpec("scalar", "float32", ()),
    ),
    state=StateSpec(2, 1, 4, 6),
    sparsity=SparsitySpec(
        Method.CATS,
        0.5,
        sites=(
            SiteSpec(0, "gate.0", 12, 6.0, 16, 0.1, counted=True),
            SiteSpec(2, "gate.2", 12, 6.5, 16),
        ),
        dense_layers=(1,),
        step=768,
        density=0.75,
    ),
    period=PeriodSpec(8, 3, 0.5, 4, threshold=0.25, verify_temperature=1.5),
    eos_token_ids=(2, 3),
    pad_token_id=None,
    passes=(PassRecord("canonicalize", 3, 0.01, 20, 18),),
    tools=ToolVersions("0.1.0", "2.13.0", "5.23.0"),
)
MANIFEST = Manifest(FORMAT_VERSION, PROGRAM, {"config": FileRecord(10, "ab" * 32)})


def plain(value: Any) -> JSON:
    """As it comes out of a file."""
    return json.loads(json.dumps(to_json(value), allow_nan=False))


@pytest.mark.parametrize("value", [PROGRAM, MANIFEST], ids=lambda value: type(value).__name__)
def test_a_value_comes_back_as_it_was(value: ProgramSpec | Manifest) -> None:
    back = from_json(type(value), plain(value))
    assert back == value
    assert plain(back) == plain(value)


def test_enums_and_tuples_come_back_as_such() -> None:
    back = from_json(ProgramSpec, plain(PROGRAM))
    assert back.sparsity.method is Method.CATS
    assert back.model.dtype is DType.BFLOAT16
    assert isinstance(back.weights[0].shape, tuple)
    assert hash(back) == hash(PROGRAM)


def test_json_holds_plain_values_under_the_fields_names() -> None:
    written = plain(MANIFEST)
    assert written["format_version"] == list(FORMAT_VERSION)
    assert written["program"]["sparsity"]["method"] == "cats"
    assert written["program"]["pad_token_id"] is None
    assert written["program"]["entries"][0]["outputs"][0]["shape"] == ["B", "T", 32]
    assert written["files"]["config"]["size"] == 10


def test_unknown_fields_are_ignored() -> None:
    written = plain(MANIFEST)
    written["invented_later"] = {"a": [1]}
    written["program"]["model"]["colour"] = "blue"
    written["program"]["weights"][0]["compression"] = "zip"
    assert from_json(Manifest, written) == MANIFEST


def test_a_field_with_a_default_may_be_missing() -> None:
    written = plain(PROGRAM)
    del written["weights"][0]["transposed"], written["sparsity"]["dense_layers"]
    # `tree_width`, `confidence` and `refresh` are younger than the format: files may lack them.
    for name in ("threshold", "tree_width", "confidence", "refresh"):
        del written["period"][name]
    back = from_json(ProgramSpec, written)
    assert back.weights[0] == PROGRAM.weights[0]
    assert back.sparsity.dense_layers == ()
    assert back.period == PeriodSpec(period=8, verify_temperature=1.5)


def test_a_whole_number_may_stand_for_a_float() -> None:
    written = plain(PROGRAM)
    written["sparsity"]["keep"] = 1
    keep = from_json(ProgramSpec, written).sparsity.keep
    assert (keep, type(keep)) == (1.0, float)


FAULTS: list[tuple[str, JSON, str]] = [
    # a path to the value, what stands there instead, what is said
    ("", [], "manifest: an object is expected, found list"),
    ("program", None, "manifest.program: an object is expected, found NoneType"),
    ("format_version", [1], "manifest.format_version: 2 values are expected, found 1"),
    ("format_version", [1, "0"], "manifest.format_version[1]: int is expected, found '0'"),
    ("format_version", 1, "manifest.format_version: a list is expected, found int"),
    ("files", [], "manifest.files: an object is expected, found list"),
    ("files", {"a": 1}, "manifest.files['a']: an object is expected, found int"),
    ("program.model.source", 3, "manifest.program.model.source: str is expected, found 3"),
    ("program.model.vocab_size", 3.5, "vocab_size: int is expected, found 3.5"),
    ("program.model.vocab_size", True, "vocab_size: int is expected, found True"),
    ("program.model.dtype", "float8", "dtype: 'float8' is not one of float32, bfloat16, float16"),
    ("program.model.dtype", [], "dtype: [] is not one of float32, bfloat16, float16"),
    ("program.model.revision", 1, "revision: 1 is not one of str | None"),
    ("program.sparsity.method", "relu", "method: 'relu' is not one of griffin, topk, cats, teal,"),
    ("program.sparsity.keep", "half", "keep: float is expected, found 'half'"),
    ("program.sparsity.keep", 10**400, "keep: an integer too large for a float"),
    ("program.sparsity.sites.1.units", "6", "sites[1].units: int is expected, found '6'"),
    ("program.weights.1.transposed", 1, "weights[1].transposed: bool is expected, found 1"),
    ("program.weights.0.shape", [8, None], "weights[0].shape[1]: int is expected, found None"),
    ("program.entries.0.inputs.0.shape.0", 1.5, "shape[0]: 1.5 is not one of int | str"),
    ("program.eos_token_ids", 2, "eos_token_ids: a list is expected, found int"),
    ("program.pad_token_id", "x", "pad_token_id: 'x' is not one of int | None"),
]


def holder(root: JSON, path: str) -> tuple[Any, Any]:
    """The container of the value at `path`, and its key there."""
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in steps:
        root = root[step]
    return root, last


@pytest.mark.parametrize(("path", "value", "message"), FAULTS)
def test_a_wrong_value_is_refused_by_its_place(path: str, value: JSON, message: str) -> None:
    written = plain(MANIFEST)
    if path:
        container, key = holder(written, path)
        container[key] = value
    else:
        written = value
    with pytest.raises(ArtifactError, match=re.escape(message)):
        from_json(Manifest, written)


REQUIRED = [
    "program",
    "files",
    "program.model",
    "program.model.revision",
    "program.weights.2.shape",
    "program.state.layers",
    "program.sparsity.keep",
    "program.tools.torch",
    "files.config.sha256",
]


@pytest.mark.parametrize("path", REQUIRED)
def test_a_missing_field_is_refused_by_its_name(path: str) -> None:
    written = plain(MANIFEST)
    container, key = holder(written, path)
    del container[key]
    with pytest.raises(ArtifactError, match=rf"^manifest.*\.{key} is missing$"):
        from_json(Manifest, written)


def test_errors_name_the_place_that_the_caller_gives() -> None:
    with pytest.raises(ArtifactError, match=r"^state\.layers is missing$"):
        from_json(StateSpec, {}, "state")


def test_an_entry_by_name() -> None:
    assert PROGRAM.entry("full") is PROGRAM.entries[0]
    with pytest.raises(ArtifactError, match="no entry 'prefill'; it has: full, sparse"):
        PROGRAM.entry("prefill")


@settings(max_examples=200)
@given(st.data(), json_values | st.just(10**400))
def test_a_manifest_with_one_value_changed_is_read_or_refused(
    data: st.DataObject, value: JSON
) -> None:
    written = plain(MANIFEST)
    container, key = data.draw(st.sampled_from(places(written)))
    container[key] = value
    try:
        manifest = from_json(Manifest, written)
    except ArtifactError:
        return
    assert isinstance(manifest, Manifest)


@given(json_values)
def test_any_json_is_refused_without_another_error(value: JSON) -> None:
    with pytest.raises(ArtifactError, match=r"^manifest"):
        from_json(Manifest, value)
