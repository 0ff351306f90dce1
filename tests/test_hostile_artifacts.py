"""Artifacts with a value changed and hashes that fit: refused by an ArtifactError when they are
loaded, or loaded rightly and run; never another exception, a crash or a hang.

These are slow: artifacts of all methods, compiled here. The fast suite has `test_fuzz`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sirius_compile.product import Compiled
from sirius_runtime.errors import ArtifactError
from sirius_runtime.graph import from_document, to_document
from sirius_runtime.graph_check import check_entries, check_graph
from sirius_runtime.manifest_check import check_program
from sirius_runtime.spec import FORMAT_VERSION, JSON, Manifest, ProgramSpec, from_json, to_json
from tests.support.models import TinyModels
from tests.support.mutations import mutated

SECONDS = 30  # of one artifact


def in_a_process(sound: Path, folder: Path, count: int, seed: int) -> dict[str, int]:
    code = (
        "import sys, json; from pathlib import Path; "
        "from tests.support.mutations import attack; "
        "found = attack(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]));"
        "print(json.dumps(found))"
    )
    command = [sys.executable, "-c", code, *map(str, (sound, folder, count, seed))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60 + SECONDS * count,
        env=environment,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.stderr[-3000:])
    found: dict[str, int] = json.loads(lines[-1])
    assert sum(found.values()) == count
    return found


@pytest.fixture(scope="module")
def artifact(whole: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole.save(tmp_path_factory.mktemp("hostile") / "sound.sirius")


@pytest.mark.slow
def test_hundreds_of_hostile_documents(whole: Compiled) -> None:
    """Read and checked in this process: nothing of them runs."""
    chance = random.Random(0)
    graphs = whole.program.graphs.items()
    documents = {name: json.dumps(to_document(graph)) for name, graph in graphs}
    manifest = json.dumps(to_json(Manifest(FORMAT_VERSION, whole.spec, {})))
    accepted = 0
    for _ in range(200):
        accepted += not refuses(read_manifest, mutated(manifest, chance))
    assert 20 < accepted < 120
    accepted = 0
    for index in range(100):
        name = ("sparse", "full", "observe", "prefill")[index % 4]
        document = mutated(documents[name], chance)
        accepted += not refuses(lambda d, n=name: read_graph(whole.spec, n, d), document)
    assert 5 < accepted < 60


def read_manifest(document: JSON) -> None:
    program = from_json(Manifest, document).program
    check_program(program)
    check_entries(program)


def read_graph(spec: ProgramSpec, name: str, document: JSON) -> None:
    module = from_document(document, torch.float32, torch.device("cpu"))
    check_graph(spec, spec.entry(name), module, torch.float32)


def refuses(read: Callable[[JSON], None], document: JSON) -> bool:
    try:
        read(document)
    except ArtifactError:
        return True
    return False


@pytest.mark.slow
def test_some_hostile_artifacts(artifact: Path, tmp_path: Path) -> None:
    found = in_a_process(artifact, tmp_path, 40, seed=1)
    assert found["refused"] > 15
    assert found["loaded"] > 3, "what does no harm is loaded"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_many_hostile_periods(artifact: Path, tmp_path: Path, seed: int) -> None:
    in_a_process(artifact, tmp_path, 250, seed)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["griffin+teal", "cats", "topk", "none"])
@pytest.mark.parametrize("seed", [8, 10])  # even: the entries, which is all that there is of these
def test_many_hostile_artifacts(tiny: TinyModels, tmp_path: Path, method: str, seed: int) -> None:
    sound = tiny("llama", method).compiled.save(tmp_path / "sound.sirius")
    in_a_process(sound, tmp_path, 250, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [12, 14])
def test_many_hostile_mixtures(tiny: TinyModels, tmp_path: Path, seed: int) -> None:
    experts = {"num_local_experts": 6, "num_experts_per_tok": 3}
    sound = tiny("mixtral", "experts", **experts).compiled.save(tmp_path / "sound.sirius")
    in_a_process(sound, tmp_path, 250, seed)
