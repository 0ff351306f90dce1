"""Golden artifacts: a tiny file of each kind, of each format version, kept for ever.

`tests/artifacts/VERSION/NAME.sirius.xz`, and beside them `tokens.json`: what each answered when it
was made. `tests.support.golden_recipes` makes them. Nothing here imports the compiler.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sirius_runtime import load
from sirius_runtime.model import SiriusModel
from sirius_runtime.spec import FORMAT_VERSION, NESTED_FORMAT_VERSION

FOLDER = Path(__file__).parents[1] / "artifacts"
VERSION = ".".join(map(str, FORMAT_VERSION))
NESTED_VERSION = ".".join(map(str, NESTED_FORMAT_VERSION))
PROMPT = (7, 50, 11, 60)
RUNS: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "sparse": {"mode": "sparse"},
    "sirius": {"mode": "sirius"},
    "exact": {"mode": "exact", "tree_width": 2},
}


def kept() -> list[str]:
    """``VERSION/NAME`` of every golden artifact."""
    found = (path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("*/*.sirius.xz"))
    return sorted(name.removesuffix(".sirius.xz") for name in found)


def unpack(name: str, folder: Path) -> Path:
    """The file of a golden artifact ``VERSION/NAME``, in a folder."""
    path = folder / f"{name.replace('/', '-')}.sirius"
    path.write_bytes(lzma.decompress((FOLDER / f"{name}.sirius.xz").read_bytes()))
    return path


def answers(model: SiriusModel) -> dict[str, list[int]]:
    """What it says in each mode."""
    return {
        name: list(model.generate(input_ids=[PROMPT], max_new_tokens=12, **run).tokens[0])
        for name, run in runs(model)
    }


def runs(model: SiriusModel) -> Iterator[tuple[str, dict[str, Any]]]:
    """The runs that a model's back end can do."""
    for name, run in RUNS.items():
        whole = model.backend.limits is not None
        own = {key: value for key, value in run.items() if not (whole and key == "tree_width")}
        yield name, {"fallback": False} | own if run["mode"] in ("sirius", "exact") else own


def opened(path: Path, name: str) -> SiriusModel:
    """The model of a golden artifact, behind the back end that its graphs are for; in float32,
    where the likeliest tokens of all machines are the same.
    """
    if name.endswith("-onnx"):
        return load(path, backend="onnxruntime", progress=lambda _: None)
    return load(path, device="cpu", dtype="float32")


def tokens_of(version: str) -> dict[str, dict[str, list[int]]]:
    """What the artifacts of a version answered, by name and run."""
    path = FOLDER / version / "tokens.json"
    found: dict[str, dict[str, list[int]]] = json.loads(path.read_text()) if path.exists() else {}
    return found
