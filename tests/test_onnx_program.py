"""What `onnx/program.json` may say: the manifest's program; graphs and weights that are there."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from sirius_runtime.backends.onnx_graphs import run_bound
from sirius_runtime.errors import ArtifactError
from sirius_runtime.onnx_files import OnnxProgram, graph_file, read_program
from sirius_runtime.spec import to_json
from tests.test_spec import PROGRAM

GRAPHS = ("prefill", "sparse", "full", "period", "pick", "write")


def sound() -> dict[str, Any]:
    spec = {"weights": ["embed"], "constants": ["inv_freq"]}
    return json.loads(
        json.dumps(
            {
                "opset": 20,
                "ir_version": 9,
                "onnx": "1.19",
                "graphs": dict.fromkeys(GRAPHS, spec),
                "model": to_json(PROGRAM.model),
                "state": to_json(PROGRAM.state),
                "method": "cats",
                "kept": [],
                "period": to_json(PROGRAM.period),
                "eos_token_ids": [2, 3],
            }
        )
    )


def read(document: Any) -> OnnxProgram:
    names = ["onnx/program.json", *map(graph_file, GRAPHS)]
    artifact: Any = SimpleNamespace(
        path="model.sirius",
        program=PROGRAM,
        names=lambda prefix: [name for name in names if name.startswith(prefix)],
        read_json=lambda name: document,
    )
    return read_program(artifact)


def test_a_sound_program_is_read() -> None:
    assert set(read(sound()).graphs) == set(GRAPHS)


def without(name: str) -> Any:
    return lambda d: d["graphs"].pop(name)


SPOILT: dict[str, tuple[Any, str]] = {
    "no object": (lambda d: d.clear(), r"program\.json\.opset is missing"),
    "another model": (lambda d: d["model"].update(vocab_size=33), "model contradicts"),
    "another state": (lambda d: d["state"].update(key_dim=8), "state contradicts"),
    "another method": (lambda d: d.update(method="topk"), "method contradicts"),
    "another period": (lambda d: d["period"].update(period=9), "period contradicts"),
    "another end": (lambda d: d.update(eos_token_ids=[]), "eos_token_ids contradicts"),
    "no graph": (without("sparse"), "there is no graph sparse"),
    "no graph that chooses": (lambda d: d.update(kept=["gate"]), "there is no graph select"),
    "no file": (
        lambda d: d["graphs"].update(more={"weights": [], "constants": []}),
        "no entry 'onnx/more.onnx'",
    ),
    "no weight": (
        lambda d: d["graphs"]["full"]["weights"].append("ghost"),
        "weight 'ghost' of full is not stored",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_not_the_manifest_s_is_refused(case: str) -> None:
    spoil, message = SPOILT[case]
    document = sound()
    spoil(document)
    with pytest.raises(ArtifactError, match=rf"^model\.sirius: .*{message}"):
        read(document)


def failing(message: str) -> Any:
    def run(binding: object) -> None:
        raise Exception(message)

    return SimpleNamespace(run_with_iobinding=run)


def test_a_graph_that_fails_is_the_artifact_s_fault() -> None:
    with pytest.raises(ArtifactError, match=r"'full' failed as it ran \(Got invalid dimensions"):
        run_bound("full", failing("Got  invalid\ndimensions"), None)
    with pytest.raises(Exception, match=r"^Failed to allocate memory"):
        run_bound("full", failing("Failed to allocate memory for 8 bytes"), None)
