"""Weights in two tiers: the same tokens whatever stays in memory, and clean ends."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import cycle, product
from mmap import mmap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.random_artifact import write
from sirius_compile import CompileConfig, compile_model
from sirius_runtime import load
from sirius_runtime.artifact import Artifact
from sirius_runtime.controller import Controller
from sirius_runtime.errors import ArtifactError, BackendError, ConfigError, GenerationError
from sirius_runtime.model import SiriusModel
from sirius_runtime.tiers.budget import in_units, read_size
from sirius_runtime.tiers.direct_file import DirectFile
from sirius_runtime.tiers.placement import PAGE, Block, Needs, least_room, place
from sirius_runtime.tiers.stream import Load, Stream, scheduled
from tests.support.cli import Cli
from tests.support.families import CONFIGS
from tests.support.fast import gate_but, slow_but
from tests.support.golden_artifacts import answers, kept, unpack
from tests.support.models import random_decoder, word_tokenizer, write_calibration
from tests.support.tiered import streamed, tiered

PROMPTS = [[7, 8, 9], [50, 30, 11, 22, 60]]
MODES = ("sirius", "exact", "full", "sparse")
GOLDEN = [name for name in kept() if "onnx" not in name and not name.startswith("1.0/")]
SHARED = [*zip(GOLDEN, cycle((0.0, 0.4)))]


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of nested weights, of which drafts read 4 bits; two layers, input channels skipped."""
    folder = tmp_path_factory.mktemp("nested")
    options = CompileConfig(
        sparsity="teal",
        weights="int8",
        calibration=write_calibration(folder / "words.txt"),
        graphs="entries",
        period=4,
    )
    model = random_decoder("phi3", **CONFIGS.get("phi3", {}))
    compiled = compile_model(model, options, tokenizer=word_tokenizer())
    return compiled.save(folder / "model.sirius")


def tokens(model: SiriusModel, mode: str) -> Sequence[Sequence[int]]:
    return model.generate(PROMPTS, mode=mode, max_new_tokens=12).tokens


# the same tokens


@pytest.mark.parametrize(
    ("name", "share"),
    slow_but(
        product(GOLDEN, (0.0, 0.4)),
        [case for case in SHARED if "period" in case[0] or "nested" in case[0]],
        SHARED,
    ),
)
def test_every_kind_of_artifact(name: str, share: float, tmp_path: Path) -> None:
    path = unpack(name, tmp_path)
    model, _ = tiered(path, share)
    assert streamed(model) > 0
    assert answers(model) == answers(load(path, device="cpu"))


@pytest.mark.parametrize("share", gate_but((0.0, 0.6, 1.0), {0.6}))
def test_nested_weights_in_every_mode(nested: Path, share: float) -> None:
    """Both planes, one of them, or none come from the file."""
    plain, (model, _) = load(nested), tiered(nested, share)
    assert (streamed(model) == 0) is (share == 1.0)
    for mode in MODES:
        assert tokens(model, mode) == tokens(plain, mode), mode
    sampled = [m.generate(PROMPTS, mode="sample", seed=1).tokens for m in (model, plain)]
    assert sampled[0] == sampled[1]
    assert model.score(PROMPTS) == plain.score(PROMPTS)


@pytest.mark.parametrize("share", gate_but((0.0, 0.4), {0.4}))
def test_a_tier_of_a_gpu_on_a_pretend_device(nested: Path, share: float) -> None:
    plain, (model, _) = load(nested), tiered(nested, share, host=True)
    for mode in MODES:
        assert tokens(model, mode) == tokens(plain, mode), mode


def test_through_the_page_cache(nested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the file system has no direct reads."""
    plain = load(nested)
    monkeypatch.setattr(os, "O_DIRECT", 0)
    model, file = tiered(nested)
    assert not file.direct
    assert tokens(model, "sirius") == tokens(plain, "sirius")


def test_drafts_stay_before_verification(nested: Path) -> None:
    """Low planes are read once a period: they stay after all that drafts read, if at all."""
    model, _ = tiered(nested, 0.55)
    placement = model.backend.placement  # type: ignore[attr-defined]
    assert placement.bytes_of("sparse") == 0 < placement.bytes_of("full")
    low = {block for step in placement.steps["full"] for block in step}
    assert {block.plane for block in low} == {1}


def test_periods_are_chosen_where_weights_stream(
    nested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, by a controller that knows the stream's seconds; where all stays, as ever."""
    monkeypatch.setattr("sirius_runtime.request.FALLBACK", True)
    told: list[float] = []
    model_widths = []

    def controller(most: int, widths: Sequence[int], streaming: float) -> Controller:
        told.append(streaming)
        model_widths.append(tuple(widths))
        return Controller(most, widths, streaming)

    monkeypatch.setattr("sirius_runtime.generation.Controller", controller)
    plain, (model, _), (whole, _) = load(nested), tiered(nested), tiered(nested, 1.0)
    assert tokens(model, "exact") == tokens(plain, "exact")
    assert told == [model.backend.stream_seconds]
    assert told[0] > 0
    assert model_widths == [(plain.program.period.tree_width,)]
    tokens(whole, "exact")
    tokens(model, "full")
    model.generate(PROMPTS, period=3, max_new_tokens=4)
    model.generate(PROMPTS, fallback=False, max_new_tokens=4)
    assert len(told) == 1


# placements and streams, by their laws


def needs_of(sizes: Sequence[Sequence[int]], draws: random.Random) -> Needs:
    """Steps of blocks of these sizes; the draft reads some of them, and one block has to stay."""
    steps, at = [], 100
    for number, step in enumerate(sizes):
        blocks = []
        for index, size in enumerate(step):
            blocks.append(Block(f"{number}.{index}", 0, at, at + size))
            at += size
        steps.append(tuple(blocks))
    some = tuple(kept for step in steps if (kept := tuple(b for b in step if draws.random() < 0.5)))
    stays = Block("stays", 0, at, at + 10)
    return Needs(
        {"full": tuple(steps), "sparse": some}, frozenset({stays}), {"full": 1.0, "sparse": 15.0}
    )


many_sizes = st.lists(
    st.lists(st.integers(1, 5 * PAGE), min_size=1, max_size=3), min_size=1, max_size=8
)


@given(many_sizes, st.integers(0, 2**20), st.integers())
def test_a_placement_fits_and_what_drafts_read_stays_first(
    sizes: list[list[int]], more: int, seed: int
) -> None:
    needs = needs_of(sizes, random.Random(seed))
    least = least_room(needs)
    placement = place(needs, least + more)
    assert placement.memory <= least + more
    everything = {block for steps in needs.steps.values() for step in steps for block in step}
    left = {block for steps in placement.steps.values() for step in steps for block in step}
    assert left | placement.held == everything | needs.pinned
    assert not left & placement.held
    wider = place(needs, least + more + 4 * PAGE)
    assert wider.streamed <= placement.streamed or wider.held > placement.held
    with pytest.raises(ConfigError, match=f"at least {least:,} bytes"):
        place(needs, least - 1)


class Bytes:
    """A slow tier that copies at once or late, and an arena that shows who overwrote what."""

    def __init__(self, source: bytes, size: int, late: random.Random) -> None:
        self.source, self.arena, self._late = source, bytearray(size), late
        self.fetched = 0

    def fetch(self, load: Load) -> Bytes.Copy:
        self.fetched += 1
        copy = Bytes.Copy(self, load)
        if self._late.random() < 0.5:
            copy.wait()
        return copy

    def release(self) -> None: ...

    def rows(self, *_: object) -> None: ...

    class Copy:
        def __init__(self, tier: Bytes, load: Load) -> None:
            self._tier, self._load = tier, load

        def wait(self) -> None:
            load = self._load
            data = self._tier.source[load.first : load.first + load.room]
            self._tier.arena[load.place : load.place + len(data)] = data

        def cancel(self) -> None: ...


@given(many_sizes, st.integers(0, 40 * PAGE), st.integers())
def test_what_a_step_reads_is_there_until_it_is_done(
    sizes: list[list[int]], more: int, seed: int
) -> None:
    draws = random.Random(seed)
    needs = needs_of(sizes, draws)
    placement = place(needs, least_room(needs) + more)
    source = draws.randbytes(max(block.end for block in needs.reads()) + PAGE)
    tier = Bytes(source, placement.ring, draws)
    schedules = {
        entry: scheduled(steps, 0, placement.ring) for entry, steps in placement.steps.items()
    }
    stream = Stream(tier, schedules)
    for _ in range(4):
        entry = draws.choice(list(schedules))
        with stream.running(entry):
            for number, loads in enumerate(schedules[entry]):
                stream.wait(number)
                for load in loads:
                    found = bytes(tier.arena[load.place : load.place + load.needed])
                    assert found == source[load.first : load.first + load.needed]
                stream.done(number)


def test_the_first_steps_of_a_pass_are_read_ahead() -> None:
    """While a draft that streams nothing runs, verification's first steps come."""
    blocks = [Block(str(i), 0, i * PAGE, (i + 1) * PAGE) for i in range(4)]
    tier = Bytes(bytes(4 * PAGE), 2 * PAGE, random.Random(0))
    full = scheduled([(block,) for block in blocks], 0, 2 * PAGE)
    stream = Stream(tier, {"full": full, "sparse": ()})
    with stream.running("full"):
        for step in range(4):
            stream.wait(step)
            stream.done(step)
    assert tier.fetched == 4 + 2
    with stream.running("sparse"):
        pass
    with stream.running("full"):
        assert tier.fetched == 4 + 2
        for step in range(4):
            stream.wait(step)
            stream.done(step)
    assert tier.fetched == 8 + 2


# what can go wrong


@pytest.fixture
def copied(nested: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(nested, tmp_path / "model.sirius"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Errors that the next reads of files raise."""
    errors: list[BaseException] = []
    read = os.preadv

    def broken(*args: object) -> int:
        if errors:
            raise errors.pop()
        return read(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", broken)
    return errors


def test_a_disk_that_fails_once(copied: Path, reads: list[BaseException]) -> None:
    model, _ = tiered(copied)
    right = tokens(model, "sirius")
    # What is read ahead already may be given up, and what goes wrong there with it.
    for *_, begun in model.backend.stream._pending:  # type: ignore[attr-defined]
        for pending in begun:
            pending.wait()
    reads.append(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(ArtifactError, match=r"can't be read, at byte .* \(Input/output error\)"):
        model.generate(PROMPTS, max_new_tokens=12)
    assert tokens(model, "sirius") == right


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("most", [1, 512, PAGE, PAGE + 100, 3 * PAGE])
def test_reads_that_give_fewer_bytes(
    nested: Path, monkeypatch: pytest.MonkeyPatch, most: int, direct: bool
) -> None:
    """Reading goes on where a read ended."""
    if not direct:
        monkeypatch.setattr(os, "O_DIRECT", 0)
    right = nested.read_bytes()
    whole, read = mmap(-1, -(-len(right) // PAGE) * PAGE), os.preadv
    seen: set[int] = set()
    with Artifact.open(nested) as artifact:
        assert artifact.file is not None
        file = DirectFile(artifact.file, whole)
    assert file.direct is direct

    def short(descriptor: int, into: list[memoryview], offset: int) -> int:
        assert not direct or offset % PAGE == 0
        given = read(descriptor, into, offset)
        if offset % PAGE or offset in seen or given <= most:
            return given
        seen.add(offset)
        into[0][most:] = bytes(len(into[0]) - most)
        return most

    monkeypatch.setattr(os, "preadv", short)
    monkeypatch.setattr("sirius_runtime.tiers.direct_file.CHUNK", 4 * PAGE)
    file.fetch(Load(0, len(whole), len(right), 0)).wait()
    assert bytes(whole[: len(right)]) == right
    assert len(seen) >= len(right) // (4 * PAGE)


@pytest.mark.parametrize(
    ("gives", "says"),
    [(0, "the file ended at byte 0, within its weights"), (512, "gives only 512 bytes")],
)
def test_reads_that_give_no_more(
    nested: Path, monkeypatch: pytest.MonkeyPatch, gives: int, says: str
) -> None:
    """As of a file system that says less than the file's size: an end, not a loop."""
    with Artifact.open(nested) as artifact:
        assert artifact.file is not None
        file = DirectFile(artifact.file, mmap(-1, PAGE))
    monkeypatch.setattr(os, "preadv", lambda *_: gives)
    with pytest.raises(ArtifactError, match=says):
        file.fetch(Load(0, PAGE, PAGE, 0)).wait()


def test_an_interrupt_in_the_middle(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiered(copied)
    right = tokens(model, "sirius")
    stream = model.backend.stream  # type: ignore[attr-defined]
    begin = DirectFile.fetch
    left = [9]

    def interrupted(file: DirectFile, load: Load) -> object:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return begin(file, load)

    monkeypatch.setattr(DirectFile, "fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokens(model, "sirius")
    assert not stream._pending
    monkeypatch.setattr(DirectFile, "fetch", begin)
    assert tokens(model, "sirius") == right


def test_a_file_cut_short_while_it_is_used(copied: Path) -> None:
    model, _ = tiered(copied)
    stop = model.backend.stream  # type: ignore[attr-defined]
    tokens(model, "sirius")
    stop.close()  # what was read ahead is there already
    size = copied.stat().st_size
    os.truncate(copied, size // 2)
    with pytest.raises(ArtifactError, match=f"has {size // 2} bytes now, and had {size}"):
        tokens(model, "sirius")
    with pytest.raises(ArtifactError, match=f"has {size // 2} bytes now"):
        passed(model, "full")


def passed(model: SiriusModel, entry: str) -> None:
    """Streams what a pass reads, and computes nothing."""
    stream = model.backend.stream  # type: ignore[attr-defined]
    with stream.running(entry):
        for step in range(len(stream._schedules[entry])):
            stream.wait(step)
            stream.done(step)


def test_a_forked_child_is_told(nested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiered(nested)
    model.backend.stream.close()  # type: ignore[attr-defined]
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(BackendError, match="load the model in the child"):
        tokens(model, "full")


def test_weights_that_were_altered(copied: Path) -> None:
    with copied.open("r+b") as file:
        file.seek(copied.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ArtifactError, match="wrong sha256 of 'weights/"):
        load(copied, memory_budget="4GiB")


def test_a_budget_below_the_least_names_it(nested: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory budget of 1,000 bytes is too small.* at least"):
        load(nested, memory_budget=1000)


def test_a_budget_and_the_whole_of_a_request(nested: Path) -> None:
    model = load(nested, memory_budget="4GiB", context=8)
    assert tokens(model, "sirius") == tokens(load(nested), "sirius")
    with pytest.raises(GenerationError, match=r"leaves [0-9,]+ for it: .*--context"):
        model.generate([PROMPTS[0]] * 400, max_new_tokens=12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"copy": True}, "copy reads the whole file"),
        ({"backend": "period"}, "backend period keeps all weights in memory"),
        ({"dtype": "bfloat16"}, "as they are stored, in float32"),
        ({"context": 1}, "context must be in"),
        ({"memory_budget": "6 pounds"}, "must be a size such as 6GiB"),
        ({"memory_budget": 0}, "must be a size such as 6GiB"),
    ],
)
def test_what_does_not_go_with_a_budget(
    nested: Path, options: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load(nested, **{"memory_budget": "4GiB", **options})  # type: ignore[arg-type]


def test_sizes() -> None:
    assert read_size("6GiB", "x") == 6 * 2**30
    assert read_size("1.5 mb", "x") == 1_500_000
    assert read_size("77", "x") == read_size(77, "x") == 77
    assert in_units(3 * 2**29) == "1.50 GiB"


@pytest.mark.gate
def test_inspect_shows_the_placement(
    nested: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = Cli(capsys, monkeypatch)
    shown = cli.run("inspect", nested, "--placement", "--memory-budget", "4GiB")
    assert shown.code == 0
    row = next(line for line in shown.out.splitlines() if "o_proj.weight, low plane" in line)
    assert row.split()[3:5] == ["2", "1"]  # blocks, reads a period
    alone = cli.run("inspect", nested, "--placement")
    assert alone.code == 2
    assert "--memory-budget SIZE" in alone.err
    few = cli.run("inspect", nested, "--placement", "--memory-budget", "1MiB")
    assert few.code == 2
    assert "at least" in few.err


@pytest.mark.slow
def test_two_processes_on_one_file(nested: Path) -> None:
    code = (
        "import torch; torch.set_num_threads(1); from pathlib import Path; "
        "from tests.support.tiered import tiered; "
        f"model, _ = tiered(Path({str(nested)!r})); "
        f"print(model.generate({PROMPTS!r}, max_new_tokens=12, fallback=False).tokens)"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    assert said[0] == said[1] == f"{load(nested).generate(PROMPTS, max_new_tokens=12).tokens}\n"


_IN_A_CHILD = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from sirius_runtime import load
from sirius_runtime.errors import ConfigError

path = sys.argv[1]
try:
    load(path, memory_budget=1, context=600, verify=False)
except ConfigError as error:
    least = int(re.search(r"at least ([0-9,]+) bytes", str(error))[1].replace(",", ""))
budget = least + 40 * 2**20
model = load(path, memory_budget=budget, context=600)
assert model.backend.placement.streamed > 0
prompt = list(range(512))
tokens = model.generate([prompt], period=4, max_new_tokens=8, fallback=False).tokens
status = Path("/proc/self/status").read_text()
peak = int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024
print(budget, peak, tokens, flush=True)
while True:
    model.generate([[7, 8, 9]], period=4, max_new_tokens=32)
"""


@pytest.mark.slow
def test_a_process_keeps_to_its_budget_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    """Of 0.4 GB of weights: near the least that a budget can be, which an error names."""
    write("1b", path := tmp_path / "model.sirius", layers=2)
    child = subprocess.Popen(
        [sys.executable, "-c", _IN_A_CHILD, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    said = child.stdout.readline()
    assert said, child.communicate()[1]
    budget, peak, said = said.split(maxsplit=2)
    assert int(peak) <= int(budget)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert errors.rstrip().endswith("KeyboardInterrupt"), errors
    plain = load(path, device="cpu")
    prompt = list(range(512))
    wanted = plain.generate([prompt], period=4, max_new_tokens=8, fallback=False).tokens
    assert said == f"{wanted}\n"
