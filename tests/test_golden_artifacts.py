"""Golden artifacts: artifacts of every format version load, and give the recorded output."""

from __future__ import annotations

from pathlib import Path

import pytest

from sirius_runtime.artifact import Artifact
from sirius_runtime.self_test import Outcome
from sirius_runtime.spec import FORMAT_VERSION, NESTED_FORMAT_VERSION
from sirius_runtime.verification import verify
from tests.support.golden_artifacts import (
    FOLDER,
    NESTED_VERSION,
    VERSION,
    answers,
    kept,
    opened,
    tokens_of,
    unpack,
)
from tests.support.golden_recipes import RECIPES


@pytest.mark.parametrize("name", kept())
def test_it_answers_as_it_did(name: str, tmp_path: Path) -> None:
    version, _, own = name.partition("/")
    path = unpack(name, tmp_path)
    with Artifact.open(path) as artifact:
        assert ".".join(map(str, artifact.manifest.format_version)) == version
    model = opened(path, name)
    assert answers(model) == tokens_of(version)[own]
    if "period" in name:
        assert model.chat is not None
        assert model.chat.render([{"role": "user", "content": "w7 w8"}]) == "w7 w8 "


@pytest.mark.parametrize("name", kept())
def test_it_is_sound_and_reproduced(name: str, tmp_path: Path) -> None:
    found = verify(unpack(name, tmp_path))
    has_none = name.startswith("1.0/") or name.endswith("-onnx")
    assert (found.outcome is None) is has_none
    assert found.outcome is not Outcome.DIFFERENT


def test_these_versions_have_one_of_each() -> None:
    """To add a new format version, run python -m tests.support.golden_recipes."""
    current = (VERSION, NESTED_VERSION)
    assert {name for name in kept() if name.partition("/")[0] in current} == {
        f"{recipe.version}/{name}" for name, recipe in RECIPES.items()
    }
    versions = {tuple(map(int, path.name.split("."))) for path in FOLDER.iterdir()}
    assert versions == {
        (major, minor)
        for major, newest in (FORMAT_VERSION, NESTED_FORMAT_VERSION)
        for minor in range(newest + 1)
    }


def test_they_are_small() -> None:
    assert all(path.stat().st_size < 32 * 1024 for path in FOLDER.glob("*/*"))
