"""What graphs may hold at a time, and documents and directories that would fill the memory."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sirius_compile.product import Compiled as Made
from sirius_runtime import artifact_zip, plain_json
from sirius_runtime.artifact import Artifact
from sirius_runtime.errors import ArtifactError
from sirius_runtime.graph_memory import most_bytes, upper
from sirius_runtime.graph_sizes import add, floor_divide, multiply, named, subtract, symbol
from sirius_runtime.spec import JSON
from tests.support.artifacts import rebuild, refused, sample, write
from tests.test_graph_check import Compiled, graphs_of, node

T, B = symbol("T"), symbol("B")


@pytest.fixture(scope="module")
def griffin(whole: Made) -> Compiled:
    return graphs_of(whole)


def call(name: str, target: str, *args: JSON) -> JSON:
    return {"name": name, "op": "call", "target": target, "args": list(args)}


def inserted(*new: JSON, at: int = -1) -> Any:
    """Puts calls before the output."""

    def spoil(nodes: list[Any]) -> None:
        nodes[at:at] = new

    return spoil


@pytest.mark.parametrize("entry", ["full", "period"])
def test_one_result_that_fills_the_memory(griffin: Compiled, entry: str) -> None:
    big = inserted(call("big", "aten.zeros.default", [2**14, 2**15]))
    griffin.refused(r"node big .* would hold \d+ bytes at once, .* at most \d+", entry, big)
    griffin.check(entry, inserted(call("small", "aten.zeros.default", [2**10, 2**15])))


def test_many_results_that_fill_it_together(griffin: Compiled) -> None:
    """Each has a quarter of what is allowed; what nothing reads any more is gone."""
    quarter = [2**11, 2**15]
    alone = [call(f"z{i}", "aten.zeros.default", quarter) for i in range(20)]
    griffin.check("full", inserted(*alone))
    together = call("joined", "aten.cat.default", [node(f"z{i}") for i in range(5)])
    griffin.refused("node z4 ", "full", inserted(*alone[:5], together))


def test_sizes_that_grow_with_the_call(griffin: Compiled) -> None:
    def spoil(nodes: list[Any]) -> None:
        ids = node(next(n["name"] for n in nodes if n.get("bound") == "input_ids"))
        nodes[-1:-1] = [
            call("rows", "aten.unsqueeze.default", ids, 2),
            call("times", "aten.repeat.default", node("rows"), [1, 1, 10**6]),
        ]

    griffin.refused("node times .* would hold", "full", spoil)


def test_a_number_read_off_a_tensor_needs_a_bound(griffin: Compiled) -> None:
    """Torch holds a graph to the range as it runs."""

    def spoil(most: dict[str, int]) -> Any:
        return inserted(
            call("drawn", "aten.full.default", [], 5),
            call("number", "aten.item.default", node("drawn")),
            call("bound", "aten.sym_constrain_range.default", node("number")) | {"kwargs": most},
            call("made", "aten.zeros.default", [node("number"), 8]),
        )

    griffin.check("full", spoil({"min": 0, "max": 100}))
    griffin.refused("node made .* would hold", "full", spoil({"min": 0}))
    griffin.refused("node made .* would hold", "full", spoil({"min": 0, "max": 2**40}))
    griffin.refused("node made .* may be negative", "full", spoil({"max": 100}))


def test_weights_count_four_times(griffin: Compiled) -> None:
    """A file of a gigabyte may hold more than a small one."""
    spec = griffin.spec
    large = dataclasses.replace(spec.weights[0], name="large", shape=(2**14, 2**14))
    more = dataclasses.replace(spec, weights=(*spec.weights, large))
    assert most_bytes(more) - most_bytes(spec) == 4 * 4 * 2**28
    big = inserted(call("big", "aten.zeros.default", [2**14, 2**15]))
    griffin.check("full", big, spec=more)


def test_what_a_size_is_at_most() -> None:
    values = {"T": 10, "B": 3}
    for size, most in (
        (7, 7),
        (-7, 0),
        (T, 10),
        (add(multiply(T, B), 2), 32),
        (subtract(T, B), 10),
        (subtract(multiply(T, 5), 3), 50),
        (floor_divide(T, 4), 10),
        (floor_divide(add(multiply(T, 4), 4), 4), 11),
        (named("min(5,T)"), 5),
        (named("min(2*T + B,40)"), 23),
        (named("cut(T,0,-1*B,2)"), 10),
        (symbol("X"), 2**62),
        (named("max(T,5)"), 2**62),
        (named("((("), 2**62),
    ):
        assert upper(size, values) == most, size


@pytest.mark.parametrize("text", [b"[" + b"[]," * 10 + b"0]", b"[" + b'{"":0},' * 5 + b"0]"])
def test_json_of_many_small_values(text: bytes) -> None:
    assert plain_json.read(text, 25) == json.loads(text)
    with pytest.raises(ValueError, match="more than 9 values"):
        plain_json.read(text, 9)


def test_documents_of_many_values_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path := tmp_path / "model.sirius", sample())
    rebuild(path, lambda entries: entries.update({"graphs/full.json": b"[" + b"[]," * 9 + b"0]"}))
    with Artifact.open(path) as artifact:
        assert artifact.read_json("graphs/full.json")
    monkeypatch.setattr(plain_json.read, "__defaults__", (9,))
    refused(path, r"manifest.json is not JSON \(it has more than 9 values\)")


def test_a_directory_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path := tmp_path / "model.sirius", sample())
    monkeypatch.setattr(artifact_zip, "MOST_DIRECTORY_BYTES", 2**16)
    Artifact.open(path).close()
    with zipfile.ZipFile(path, "a") as archive:
        for index in range(1200):
            archive.writestr(f"entry{index:05}", b"")
    refused(path, "ZIP directory .* claims to have")


def test_the_error_is_of_the_artifact(griffin: Compiled) -> None:
    with pytest.raises(ArtifactError, match="compile the model again"):
        griffin.check("full", inserted(call("big", "aten.zeros.default", [2**32])))
