"""`sirius inspect`: graphs for a reader, their differences, and the page, which a browser opens
where there is one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sirius_compile.product import Compiled
from sirius_runtime.artifact import Artifact
from sirius_runtime.cli.inspect import describe, read_entry
from sirius_runtime.cli.inspect_page import page
from sirius_runtime.errors import ArtifactError
from sirius_runtime.graph_view import Graph, difference, read_graph, sections
from sirius_runtime.spec import JSON
from tests.support.artifacts import rebuild
from tests.support.browser import Reader, look
from tests.support.cli import Cli
from tests.support.golden_artifacts import unpack
from tests.support.models import TinyModels
from tests.support.mutations import nested

HOSTILE = (
    "\ud800</style><script>document.title='owned'</script><img src=//x onerror=y>\x1b[2J\u202e&\"'"
)


@pytest.fixture(scope="module")
def path(whole: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole.save(tmp_path_factory.mktemp("inspect") / "model.sirius")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def graphs_of(path: Path) -> dict[str, Graph]:
    with Artifact.open(path) as artifact:
        return {e.name: read_entry(artifact, e.name) for e in artifact.program.entries}


@pytest.mark.gate
@pytest.mark.parametrize("method", ["teal", "cats", "none"])
def test_a_screen_whatever_there_is(tiny: TinyModels, tmp_path: Path, method: str) -> None:
    model = tiny("llama", method, num_hidden_layers=5)
    with Artifact.open(model.compiled.save(tmp_path / "model.sirius")) as artifact:
        lines = describe(artifact.manifest)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    layers = [line for line in lines if "in 5 layers" in line]
    assert len(layers) == {"teal": 7, "cats": 1, "none": 0}[method]
    assert all("above" in line for line in layers)


def test_a_graph_a_call_a_line(cli: Cli, path: Path) -> None:
    done = cli.run("inspect", path, "--graph", "sparse")
    assert done.code == 0, done.err
    first, *lines = done.out.splitlines()
    assert first.startswith("sparse(input_ids, positions, slots, length, tree_mask, k_cache,")
    assert [line for line in lines if line.startswith("#")] == [
        "# before the layers",
        "# layers 0 to 1, which are alike: layer 0",
        "# after the layers",
    ]
    assert lines[-1].startswith("return [%linear")
    assert sum("sirius.griffin_mlp.default(" in line for line in lines) == 1
    assert sum("model.layers.1." in line for line in lines) == 0


def test_every_call_is_in_a_section(path: Path) -> None:
    for graph in graphs_of(path).values():
        told = sum(
            len(section.rows) * (section.last - section.first + 1)
            if 0 <= section.first < 100
            else len(section.rows)
            for (section,) in sections(graph)
        )
        assert told == len(graph.rows)


def test_inner_graphs_are_shown(cli: Cli, path: Path) -> None:
    done = cli.run("inspect", path, "--graph", "period")
    assert done.code == 0, done.err
    assert "control_flow.while_loop(" in done.out
    assert re.search(r"^    %\w+ = sirius\.block_attention\.default\(", done.out, re.MULTILINE)


def test_a_difference_told_once_for_all_layers(cli: Cli, path: Path) -> None:
    done = cli.run("inspect", path, "--diff", "full", "sparse")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("--- full: ")
    assert lines[1].startswith("+++ sparse: ")
    assert sum(line.startswith("#") for line in lines) == 1
    assert any(line.startswith("-%dense_mlp") for line in lines)
    assert any(line.startswith("+%griffin_mlp") for line in lines)
    same = cli.run("inspect", path, "--diff", "full", "full")
    assert same.out.splitlines()[2:] == ["no difference"]


def test_layers_that_differ_are_told_apart(tmp_path: Path) -> None:
    """A dense layer among sparse ones."""
    graphs = graphs_of(unpack("1.1/gemma3-cats", tmp_path))
    document = [
        {"name": "x", "op": "input", "bound": "x"},
        *({"name": f"w{i}", "op": "weight", "bound": f"model.layers.{i}.w"} for i in range(4)),
        *(
            {"name": f"c{i}", "op": "call", "target": target, "args": [{"node": "x"}, node(i), i]}
            for i, target in enumerate(["sirius.a.default", "sirius.a.default", "aten.b", "aten.b"])
        ),
        {"name": "output", "op": "output", "args": [node(3)]},
    ]
    graph = read_graph({"nodes": document})
    assert [(s.first, s.last) for (s,) in sections(graph)] == [(0, 1), (2, 2), (3, 3)]
    assert list(difference(("a", graph), ("b", graph)))[-1] == "no difference"
    assert len(graphs) == 3


def node(index: int) -> JSON:
    return {"node": f"w{index}"}


NO_GRAPHS: list[JSON] = [
    *(None, [], {}, 7, {"nodes": 7}, {"nodes": [7]}, {"nodes": [{}]}),
    {"nodes": [{"name": "x", "op": "call", "target": "t", "args": [{"node": "nothing"}]}]},
    {"nodes": [{"name": "x", "op": "call", "target": "t", "args": [{"node": []}]}]},
    {"nodes": [{"name": "x", "op": "weight"}]},
    {"nodes": [{"name": "x", "op": "call", "target": "t", "args": nested(450)}]},
    {"nodes": [{"name": "x", "op": "graph", "graph": {"nodes": [{"name": "y"}]}}]},
]


@pytest.mark.parametrize("document", NO_GRAPHS)
def test_no_graph(document: JSON) -> None:
    with pytest.raises(ArtifactError, match="not a graph document"):
        read_graph(document)


def test_graphs_without_end() -> None:
    document: JSON = {"nodes": []}
    for _ in range(50):
        document = {"nodes": [{"name": "x", "op": "graph", "graph": document}]}
    with pytest.raises(ArtifactError, match="without end"):
        read_graph(document)


def test_a_refused_graph_names_the_file(cli: Cli, path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.sirius"
    other.write_bytes(path.read_bytes())
    rebuild(other, lambda entries: entries.update({"graphs/full.json": b"[]"}))
    for flags in (("--graph", "full"), ("--html", tmp_path / "page.html")):
        done = cli.run("inspect", other, *flags)
        assert done.code == 2
        assert "graphs/full.json: not a graph document" in done.err
    assert not (tmp_path / "page.html").exists()


def test_a_file_for_onnx_runtime_has_no_graphs(cli: Cli, tmp_path: Path) -> None:
    path = unpack("1.1/llama-none-onnx", tmp_path)
    done = cli.run("inspect", path, "--graph", "full")
    assert (done.code, done.out) == (2, "")
    assert "it was compiled for ONNX Runtime only" in done.err
    assert cli.run("inspect", path, "--html", tmp_path / "page.html").code == 0
    assert "<h2>Graphs</h2>" not in (tmp_path / "page.html").read_text()


def spoil(manifest: dict[str, Any]) -> None:
    program = manifest["program"]
    program["model"] |= {"source": HOSTILE, "model_type": HOSTILE}
    for record in program["passes"]:
        record["name"] = HOSTILE


def spoil_graph(entries: dict[str, bytes]) -> None:
    document = json.loads(entries["graphs/sparse.json"])
    for one in document["nodes"]:
        if one["op"] == "call":
            one["target"] = HOSTILE
    entries["graphs/sparse.json"] = json.dumps(document).encode()


def written(cli: Cli, path: Path, folder: Path, bad: bool) -> Path:
    """The page of an artifact; `bad`: of one whose texts a browser would obey."""
    own = folder / "own.sirius"
    own.write_bytes(path.read_bytes())
    if bad:
        rebuild(own, spoil_graph, manifest=spoil)
    done = cli.run("inspect", own, "--html", folder / "page.html")
    assert done.code == 0, done.err
    return folder / "page.html"


@pytest.mark.parametrize("bad", [False, True])
def test_the_page_needs_nothing_and_runs_nothing(
    cli: Cli, path: Path, tmp_path: Path, bad: bool
) -> None:
    text = written(cli, path, tmp_path, bad).read_text()
    Reader.check(text)
    assert "\x1b" not in text
    assert text.count("<circle") > 100
    assert text.count('<path class="wire"') > 100
    if not bad:
        for entry in ("prefill", "sparse", "full", "observe", "period"):
            assert f"<summary>{entry} " in text
        assert "<h2>sparse compared with full</h2>" in text
        assert '<span class="added">+%griffin_mlp' in text


def test_wires_come_from_what_a_call_reads(path: Path) -> None:
    graphs = {"full": graphs_of(path)["full"]}
    with Artifact.open(path) as artifact:
        text = page(artifact.manifest, ["x"], graphs)
    drawn = sum(len(read) for read in drawn_reads(graphs["full"]))
    assert text.count('<path class="wire"') == drawn


def drawn_reads(graph: Graph) -> list[list[str]]:
    """Of each call that is drawn, the reads that are drawn above it."""
    found = []
    for (section,) in sections(graph):
        above: set[str] = set()
        for row in section.rows:
            found.append([name for name in row.reads if name in above])
            above.add(row.name)
    return found


@pytest.mark.slow  # it starts a browser
@pytest.mark.parametrize("bad", [False, True])
def test_a_browser_shows_it(cli: Cli, path: Path, tmp_path: Path, bad: bool) -> None:
    seen = look(written(cli, path, tmp_path, bad), tmp_path)
    assert "<title>owned</title>" not in seen.document
    assert "<script" not in seen.document
    assert seen.document.count("<circle") > 100
    assert seen.colours > 20  # the style sheet passes its own policy
