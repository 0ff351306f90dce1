"""Compilations that are killed, run out of disk or lack a file, and those that resume them."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sirius_compile import workspace
from sirius_compile.cli import main
from sirius_compile.workspace import Workspace
from sirius_runtime.artifact_writer import ArtifactWriter
from sirius_runtime.dtypes import dtype_name
from sirius_runtime.errors import ArtifactError, ConfigError
from sirius_runtime.spec import WeightSpec
from tests.support.cli import Cli
from tests.support.models import random_decoder, word_tokenizer, write_calibration

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and file locks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards, with its tokenizer, and a text in the same folder."""
    made = tmp_path_factory.mktemp("model")
    random_decoder("llama").save_pretrained(made, max_shard_size="100KB")
    word_tokenizer().save_pretrained(made)
    write_calibration(made / "words.txt")
    return made


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


FAST = ("--weights", "int8", "--graphs", "entries")


def options(folder: Path, out: Path) -> list[Any]:
    text = folder / "words.txt"
    return [folder, "--out", out, "--sparsity", "cats", "--calibration", text, *FAST]


def quick(folder: Path, out: Path) -> list[Any]:
    """Without calibration."""
    return [folder, "--out", out, "--sparsity", "topk", "--no-measure", *FAST]


def names(folder: Path) -> list[str]:
    """The names of the files and folders beside the artifacts."""
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


class Killed(BaseException):
    """Raised to kill a compilation at an exact point, which a signal can't hit."""


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Counts writes, and raises `error` halfway through write number `at`."""
    state: dict[str, Any] = {"count": 0, "at": -1, "error": Killed}
    whole = Workspace._write

    def write(self: Workspace, name: str, content: bytes | memoryview) -> None:
        state["count"] += 1
        if state["count"] == state["at"]:
            (self.folder / "part").write_bytes(bytes(content)[: len(content) // 2])
            if state["error"] is Killed:
                raise Killed
            with self._disk_faults():
                raise state["error"]
        whole(self, name, content)

    monkeypatch.setattr(Workspace, "_write", write)
    return state


@pytest.fixture(scope="module")
def wanted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, float]:
    """The bytes of a compilation that was not killed, and its seconds."""
    out = tmp_path_factory.mktemp("wanted") / "m.sirius"
    seconds = run_alone(quick(folder, out))
    return out.read_bytes(), seconds


def run_alone(arguments: list[Any], *flags: Any, seconds: float | None = None) -> float:
    """Compiles in another process, kills it after `seconds`, and returns the seconds it ran."""
    begin, child = time.perf_counter(), os.fork()
    if child == 0:
        status = 70
        try:
            torch.set_num_threads(1)  # a forked process has no others
            with open(os.devnull, "w") as sink:  # noqa: PTH123
                os.dup2(sink.fileno(), 1)
                os.dup2(sink.fileno(), 2)
            status = main([str(part) for part in (*arguments, *flags)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return time.perf_counter() - begin


@pytest.mark.gate
def test_killed_at_a_random_point(
    folder: Path, tmp_path: Path, wanted: tuple[bytes, float]
) -> None:
    """Kills it, then lets it finish."""
    out, (content, seconds) = tmp_path / "m.sirius", wanted
    given = quick(folder, out)
    run_alone(given, "--resume", "--force", seconds=random.Random(0).uniform(0.0, seconds))
    run_alone(given, "--resume", "--force")
    assert out.read_bytes() == content
    assert names(tmp_path) == []


@pytest.mark.slow
def test_killed_at_many_random_points(folder: Path, tmp_path: Path) -> None:
    """The same for a compilation that calibrates."""
    seconds = run_alone(options(folder, tmp_path / "whole.sirius"))
    content = (tmp_path / "whole.sirius").read_bytes()
    chosen = random.Random(1)
    for index in range(20):
        out = tmp_path / f"{index}.sirius"
        run_alone(options(folder, out), seconds=chosen.uniform(0.0, seconds))
        run_alone(options(folder, out), "--resume", "--force")
        assert out.read_bytes() == content
    assert names(tmp_path) == []


@pytest.mark.slow
def test_killed_at_every_other_write(
    folder: Path, tmp_path: Path, cli: Cli, writes: dict[str, Any]
) -> None:
    """Stored weights and choices are not computed again, and the artifact's bytes are the same."""
    first, out = tmp_path / "first.sirius", tmp_path / "m.sirius"
    assert cli.compile(*options(folder, first)).code == 0
    total, runs = writes["count"], 0
    assert total > 10
    for _ in range(total):
        runs += 1
        writes |= {"count": 0, "at": 4}  # the identity, two more, and half of the next
        try:
            cli.compile(*options(folder, out), "--resume")
        except Killed:
            assert not out.exists()
            assert len(names(tmp_path)) == 1
            continue
        break
    assert runs == -(-(total - 1) // 2)
    assert out.read_bytes() == first.read_bytes()
    assert names(tmp_path) == []


@pytest.mark.gate
def test_what_a_killed_process_left_is_removed(
    folder: Path, tmp_path: Path, cli: Cli, writes: dict[str, Any]
) -> None:
    out = tmp_path / "m.sirius"
    writes["at"] = 5
    with pytest.raises(Killed):
        cli.compile(*quick(folder, out))
    (left,) = names(tmp_path)
    writes["at"] = -1
    done = cli.compile(*quick(folder, out))
    assert done.code == 0
    assert "of files of a killed compilation; with --resume" in done.err
    assert names(tmp_path) == []
    assert left not in names(tmp_path)


def test_a_running_compilation_is_left_alone(tmp_path: Path) -> None:
    with Workspace(tmp_path / "m.sirius") as running:
        running.begin({"a": 1})
        for resume in (False, True):
            with Workspace(tmp_path / "m.sirius", resume=resume) as other:
                other.begin({"a": 1})
                assert other.folder != running.folder
        assert running.recall("identity.json") is not None
    assert names(tmp_path) == []


def test_other_options_are_not_resumed(
    folder: Path, tmp_path: Path, cli: Cli, writes: dict[str, Any]
) -> None:
    out = tmp_path / "m.sirius"
    writes["at"] = 5
    with pytest.raises(Killed):
        cli.compile(*quick(folder, out))
    refused = cli.compile(*quick(folder, out), "--keep", "0.4", "--resume")
    assert refused.code == 2
    assert "other options, files or versions (options)" in " ".join(refused.err.split())
    assert len(names(tmp_path)) == 1, "nothing is lost"


def test_with_nothing_to_resume_it_begins(tmp_path: Path) -> None:
    told: list[str] = []
    with Workspace(tmp_path / "m.sirius", resume=True, tell=told.append) as own:
        own.begin({})
    assert told == ["--resume: no files of a killed compilation of this artifact; starting anew"]


def test_a_full_disk_is_named_and_what_was_done_is_kept(
    folder: Path, tmp_path: Path, cli: Cli, writes: dict[str, Any]
) -> None:
    out = tmp_path / "m.sirius"
    writes |= {"at": 6, "error": OSError(errno.ENOSPC, "No space left on device")}
    full = cli.compile(*quick(folder, out))
    assert full.code == 2
    said = " ".join(full.err.split())
    assert "No space left on device" in said
    assert "continue with --resume" in said
    assert len(names(tmp_path)) == 1
    writes["at"] = -1
    assert cli.compile(*quick(folder, out), "--resume").code == 0
    assert names(tmp_path) == []


@pytest.mark.gate
def test_a_full_disk_as_the_artifact_is_written(
    folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.sirius"
    out.write_bytes(b"precious")
    with monkeypatch.context() as patched:

        def full(self: ArtifactWriter, *_: Any) -> None:
            raise ArtifactError(f"{out} can't be written (No space left on device)")

        patched.setattr(ArtifactWriter, "add_weights", full)
        stopped = cli.compile(*quick(folder, out), "--force")
    assert stopped.code == 2
    assert "continue it with --resume" in " ".join(stopped.err.split())
    assert out.read_bytes() == b"precious"
    resumed = cli.compile(*quick(folder, out), "--force", "--resume")
    assert resumed.code == 0
    assert "weights are stored already" in resumed.err
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_named(folder: Path, tmp_path: Path, cli: Cli) -> None:
    tmp_path.chmod(0o500)
    refused = cli.compile(*quick(folder, tmp_path / "m.sirius"))
    tmp_path.chmod(0o700)
    assert refused.code == 2
    assert "Permission denied" in refused.err


def test_a_missing_shard_is_named_before_anything_is_done(
    folder: Path, tmp_path: Path, cli: Cli
) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    hidden = shard.rename(tmp_path / "hidden")
    try:
        refused = cli.compile(*quick(folder, tmp_path / "m.sirius"))
    finally:
        hidden.rename(shard)
    assert refused.code == 2
    assert f"lacks {shard.name}" in " ".join(refused.err.split())
    assert names(tmp_path) == []


def test_a_weight_is_mapped_and_whole(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.uint8, torch.float32):
        tensor = torch.arange(6).to(dtype).view(3, 2)
        spec = WeightSpec(f"w{dtype}", dtype_name(dtype), (3, 2))
        with Workspace(tmp_path / "m.sirius") as own:
            own.begin({})
            assert torch.equal(own.weight(spec, lambda t=tensor: t), tensor)  # type: ignore[misc]
            again = own.weight(spec, lambda: pytest.fail("it is stored"))
            assert torch.equal(again, tensor)
            # A file cut short by a crash of the machine is made again.
            (file,) = own.folder.glob("*.weight")
            file.write_bytes(b"1")
            again = own.weight(spec, lambda t=tensor: t)  # type: ignore[misc]
        assert torch.equal(again, tensor), "a mapping outlives its file"


def test_no_place_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; create it first"):
        Workspace(tmp_path / "nowhere" / "m.sirius")
    assert workspace.fingerprint(tmp_path / "nowhere") is None
