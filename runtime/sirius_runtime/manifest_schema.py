"""The manifest's JSON Schema, for readers in other languages and for writers of artifacts.

It is generated from the dataclasses of `spec` and the ranges of `manifest_check`, and stored beside
this file as `manifest.schema.json`. ``python -m sirius_runtime.manifest_schema`` writes that file
again, and a test compares the two. A manifest is validated when it is written, and by `sirius
verify`. `load` does not use the schema: its parser checks the same types and ranges in a fraction
of the time, and also the relations between fields.

The schema allows unknown fields, because a newer minor version may add some.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from enum import StrEnum
from pathlib import Path
from typing import Any

from sirius_runtime.errors import ArtifactError
from sirius_runtime.manifest_check import RANGES
from sirius_runtime.new_file import write_file
from sirius_runtime.spec import FORMAT_VERSION, JSON, KNOWN_MAJORS, NESTED_FORMAT_VERSION, Manifest

FILE = Path(__file__).with_name("manifest.schema.json")

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN: dict[Any, JSON] = {
    bool: {"type": "boolean"},
    float: {"type": "number"},
    int: {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    str: {"type": "string"},
    types.NoneType: {"type": "null"},
}


def manifest_schema() -> JSON:
    """The schema of `manifest.json`."""
    definitions: dict[str, JSON] = {}
    root = _object(Manifest, definitions)
    root["properties"]["format_version"] = {
        "description": "major, minor: a reader refuses another major",
        "type": "array",
        "prefixItems": [{"enum": list(KNOWN_MAJORS)}, {"type": "integer", "minimum": 0}],
        "minItems": 2,
        "maxItems": 2,
    }
    return {
        "$schema": _DIALECT,
        "title": "manifest.json of a Sirius artifact, format versions "
        f"{FORMAT_VERSION[0]}.{FORMAT_VERSION[1]} and "
        f"{NESTED_FORMAT_VERSION[0]}.{NESTED_FORMAT_VERSION[1]}",
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def validate(document: JSON) -> None:
    """Raises ArtifactError, naming the place, where a manifest does not match the schema."""
    from jsonschema import Draft202012Validator  # takes 0.1 s to import, and `load` never needs it

    validator = Draft202012Validator(json.loads(FILE.read_text()))
    for error in validator.iter_errors(document):
        place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path)
        raise ArtifactError(f"manifest{place} does not match its schema: {error.message:.200}")


def _object(cls: type, definitions: dict[str, JSON]) -> dict[str, Any]:
    """The schema of a dataclass, in the order of its fields."""
    hints, ranges = typing.get_type_hints(cls), RANGES.get(cls, {})
    properties: dict[str, JSON] = {}
    required = []
    for field in dataclasses.fields(cls):
        found = _value(hints[field.name], definitions)
        if field.name in ranges:
            found = _narrowed(found, *ranges[field.name])
        properties[field.name] = found
        if field.default is dataclasses.MISSING:
            required.append(field.name)
    own: dict[str, Any] = {"description": _description(cls), "type": "object"}
    return own | {"properties": properties, "required": required}


def _value(hint: Any, definitions: dict[str, JSON]) -> JSON:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = None  # reserves the name: a class may refer to itself
            definitions[hint.__name__] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is tuple and args[-1] is Ellipsis:
        return {"type": "array", "items": _value(args[0], definitions)}
    if origin is tuple:
        every = [_value(arg, definitions) for arg in args]
        size = len(every)
        return {"type": "array", "prefixItems": every, "minItems": size, "maxItems": size}
    if origin is dict:
        return {"type": "object", "additionalProperties": _value(args[1], definitions)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_value(arg, definitions) for arg in args]}
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return {"enum": [str(member) for member in hint]}
    return dict(_PLAIN[hint])


def _narrowed(schema: JSON, least: float, most: float | None) -> JSON:
    """The schema with a range for its numbers: a number, a list of numbers, or a number or null."""
    if "anyOf" in schema:
        return {"anyOf": [_narrowed(option, least, most) for option in schema["anyOf"]]}
    if "items" in schema:
        return {**schema, "items": _narrowed(schema["items"], least, most)}
    if schema["type"] not in ("integer", "number"):
        return schema
    return {**schema, "minimum": least} | ({} if most is None else {"maximum": most})


def _description(cls: type) -> str:
    """A class's docstring on one line."""
    return " ".join((cls.__doc__ or "").split())


def text() -> str:
    """The text of the schema's file."""
    return json.dumps(manifest_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write_file(FILE, text().encode())
