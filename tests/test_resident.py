"""Resident pages of mapped files are released while they are read."""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sirius_compile import workspace
from sirius_compile.resident import bounded, release
from sirius_compile.workspace import Workspace

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SIZE = 32 << 20


def resident(path: Path) -> int:
    """Bytes of a mapped file that are resident, as the system counts them."""
    found = re.search(
        rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text()
    )
    assert found is not None
    return int(found[1]) * 1024


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, Tensor]:
    path = tmp_path / "one.weight"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path, torch.from_file(str(path), shared=False, size=SIZE, dtype=torch.uint8)


def test_pages_are_given_back_and_read_again(mapped: tuple[Path, Tensor]) -> None:
    path, tensor = mapped
    total = int(tensor.sum(dtype=torch.int64))
    assert resident(path) == SIZE
    release((str(path.parent / "other"),))
    assert resident(path) == SIZE
    release((str(path),))
    assert resident(path) == 0
    assert int(tensor.sum(dtype=torch.int64)) == total


def test_within_it_few_pages_are_resident(mapped: tuple[Path, Tensor]) -> None:
    path, tensor = mapped
    wanted = tensor.clone()
    with bounded([str(path)], 0):  # of which libraries alone are more
        deadline = time.monotonic() + 10
        assert int(tensor[0]) == 0
        while resident(path) > 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert torch.equal(tensor, wanted)
    assert not any(thread.name == "resident" for thread in threading.enumerate())
    int(tensor.sum())
    assert resident(path) == SIZE, "nobody looks any more"


def test_a_workspace_bounds_large_models_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], int]] = []

    def noted(files: list[str], limit: int) -> object:
        asked.append((files, limit))
        return bounded([], 1 << 60)

    monkeypatch.setattr(workspace, "bounded", noted)
    shard = tmp_path / "model.safetensors"
    with Workspace(tmp_path / "m.sirius") as own:
        own.begin({})
        own.bound(3 << 30, [shard])
        assert asked == []
        own.bound(10 << 30, [shard])
    ((files, limit),) = asked
    assert limit == 2 << 30
    assert str(own.folder.resolve()).startswith(files[0])
    assert files[1:] == [str(shard)]
