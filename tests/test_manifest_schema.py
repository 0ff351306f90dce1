"""The manifest's JSON Schema: never another than the classes and ranges that it is made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sirius_runtime.artifact import Artifact
from sirius_runtime.errors import ArtifactError
from sirius_runtime.manifest_schema import FILE, manifest_schema, text, validate
from sirius_runtime.spec import FORMAT_VERSION, JSON, Manifest, to_json
from tests.support.artifacts import sample, write
from tests.test_manifest_check import PROGRAM_IN_RANGE
from tests.test_spec import holder


def manifest() -> JSON:
    return json.loads(json.dumps(to_json(Manifest(FORMAT_VERSION, PROGRAM_IN_RANGE, {}))))


def test_the_file_is_what_the_classes_say() -> None:
    again = "run python -m sirius_runtime.manifest_schema"
    assert FILE.read_text() == text(), again


def test_it_is_a_schema() -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(manifest_schema())


def test_what_is_written_fits_it(tmp_path: Path) -> None:
    write(tmp_path / "model.sirius", sample())
    with Artifact.open(tmp_path / "model.sirius") as artifact:
        validate(artifact.read_json("manifest.json"))


def test_a_newer_minor_version_fits_it() -> None:
    document = manifest()
    document["format_version"][1] += 7
    document["program"]["model"]["colour"] = document["news"] = {"a": 1}
    validate(document)


FAULTS: list[tuple[str, JSON, str]] = [
    ("format_version.0", 2, "format_version[0]"),
    ("format_version", [1], "format_version"),
    ("program.model.max_seq_len", 0, "program.model.max_seq_len"),
    ("program.model.max_seq_len", 2**40, "program.model.max_seq_len"),
    ("program.model.dtype", "int8", "program.model.dtype"),
    ("program.model.revision", 7, "program.model.revision"),
    ("program.state.layers", "2", "program.state.layers"),
    ("program.sparsity.keep", 1.5, "program.sparsity.keep"),
    ("program.sparsity.sites.0.units", -1, "program.sparsity.sites[0].units"),
    ("program.passes.0.rewrites", -1, "program.passes[0].rewrites"),
    ("program.weights.0.shape", [2.5], "program.weights[0].shape[0]"),
    ("program.eos_token_ids", [2, 10**12], "program.eos_token_ids[1]"),
    ("program.pad_token_id", 2**40, "program.pad_token_id"),
    ("files", {"x": {"size": 1}}, "files.x"),
]


@pytest.mark.parametrize(("path", "value", "place"), FAULTS)
def test_what_does_not_fit_is_named(path: str, value: JSON, place: str) -> None:
    document = manifest()
    container, key = holder(document, path)
    container[key] = value
    with pytest.raises(ArtifactError) as caught:
        validate(document)
    assert str(caught.value).startswith(f"manifest.{place} does not match its schema")


def test_a_missing_field_is_named() -> None:
    document = manifest()
    del document["program"]["state"]["layers"]
    with pytest.raises(ArtifactError, match=r"manifest\.program\.state .*'layers' is a required"):
        validate(document)
