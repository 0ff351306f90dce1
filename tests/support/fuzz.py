"""Fuzzes the artifact's reader: golden artifacts, changed as an attacker would change them.

A case takes a golden artifact, changes something in it (the manifest, a graph, the ZIP's structure,
a safetensors header, the tokenizer, another entry), makes the hashes fit again, loads it and
generates. It must end in a user's error or in a right load. Everything else is a fault: another
exception, a crash, a hang, memory beyond four times the file and 1 GB, a write outside.

A case depends on its number alone: ``python -m tests.support.fuzz 1234`` runs one here, and
``… 0 20000`` a range of them, in processes that may die (`hunt`).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.artifact_mutations import KINDS, Changed, Sound, changed
from tests.support.golden_artifacts import PROMPT, kept, unpack

if TYPE_CHECKING:
    from sirius_runtime.model import SiriusModel

SECONDS = 20  # of processor time, of one case
TEXT = "w7 w50 <s>  w11\n\u00e9\ufdfa\U0001f600 </s2>w60"
MODULE = ("-m", "tests.support.fuzz")
"""What a child process runs."""
_STUCK = 120  # of any time: it waits for something
_MEMORY = 10**9  # and four times the file's size
_WRITTEN = 2**26  # bytes of a file

Told = dict[str, Any]


@dataclass
class Report:
    """What came of cases: how many of each outcome, and the faults."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


SMALLEST = ("gpt2-topk", "llama-teal-bfloat16")
"""Golden artifacts that load in half of the others' time."""


@dataclass(frozen=True)
class Hunt:
    """What is hunted: `kinds` of changes, in golden artifacts of these `names` (all if there are
    none). Of `every` loads one generates.
    """

    kinds: tuple[str, ...] = tuple(KINDS)
    names: tuple[str, ...] = ()
    every: int = 1

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Hunt:
        return cls(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        )


def hunt(first: int, count: int, what: Hunt = Hunt()) -> Report:
    """Runs cases in child processes; one that dies is replaced, and its case is a fault."""
    report, last = Report(), first + count
    with tempfile.TemporaryDirectory() as folder:
        while first < last:
            lines, ended = _child(first, last - first, what, Path(folder))
            told = [json.loads(line) for line in lines]
            for one in told:
                report.outcomes[f"{one['kind']}: {one['outcome']}"] += 1
                if one["outcome"] == "fault":
                    report.faults.append(f"case {one['case']} ({one['what']}): {one['error']}")
            first += len(told)
            if first < last:
                report.outcomes["died"] += 1
                report.faults.append(f"case {first}: the process ended ({ended})")
                first += 1
    return report


def _child(first: int, count: int, what: Hunt, folder: Path) -> tuple[Sequence[str], str]:
    """The lines of the cases that a child process came to the end of, and how it ended."""
    command = [sys.executable, *MODULE, "--child", str(first), str(count)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [*command, what.to_json(), str(folder)],
        stdout=subprocess.PIPE,
        stderr=(errors := tempfile.TemporaryFile()),
        text=True,
        env=environment,
    ) as child:
        assert child.stdout is not None
        lines = list(child.stdout)
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().splitlines()
    errors.close()
    return lines, f"code {child.returncode}: {' | '.join(said[-3:])}"


def child(first: int, count: int, what: Hunt, folder: Path) -> None:
    """Runs cases in this process, a line of JSON each."""
    with _Guarded(folder, what) as guard:
        for case in range(first, first + count):
            print(json.dumps(guard.run(case)), flush=True)


class _Guarded:
    """This process with its limits, and a hook that sees what is opened for writing."""

    def __init__(self, folder: Path, what: Hunt) -> None:
        self._folder, self._what, self._written = folder, what, list[str]()
        self._sound: dict[str, Sound] = {}
        self._watching = False

    def __enter__(self) -> _Guarded:
        import torch

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        os.chdir(self._folder)
        for name in corpus(self._what.names):
            path = unpack(name, self._folder)
            tokens = _generate(path, name)  # kernels are built, and modules imported
            _look_at(path)
            self._sound[name] = Sound.read(name, path, tokens)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_WRITTEN, _WRITTEN))
        largest = max(len(sound.content) for sound in self._sound.values())
        most = _address_space() + _MEMORY + 4 * largest
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        sys.addaudithook(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)

    def run(self, case: int) -> Told:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # which ends the process
        signal.alarm(_STUCK)
        one = changed(case, self._what.kinds, self._sound)
        path = self._folder / "changed.sirius"
        path.unlink(missing_ok=True)  # not in the place of one that is mapped
        path.write_bytes(one.content)
        told: Told = {"case": case, "kind": one.kind, "what": one.what}
        self._written.clear()
        self._watching = True
        try:
            outcome, error = outcome_of(path, one, generate=case % self._what.every == 0)
        finally:
            self._watching = False
        if self._written:
            outcome, error = "fault", f"written: {self._written[0]}"
        return told | {"outcome": outcome, "error": error}

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if flags else False
            if (writes or (mode and set(mode) & set("wax+"))) and path != os.devnull:
                self._written.append(f"{event} {path!r}")
        elif event in _CHANGING:
            self._written.append(f"{event} {arguments!r:.200}")


_CHANGING = frozenset(
    {
        *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod"),
        *("os.truncate", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"),
        *("socket.connect", "socket.bind", "shutil.rmtree", "shutil.copyfile", "ctypes.dlopen"),
        "pickle.find_class",
    }
)
"""Events of the interpreter that no load of an artifact needs."""


def outcome_of(path: Path, one: Changed, generate: bool) -> tuple[str, str]:
    """loaded, refused (now or as it runs), or fault; and the error."""
    from sirius_runtime.errors import UserError

    try:
        if not generate:
            _load(path, one.sound.name)
            return "loaded", ""
        with contextlib.suppress(UserError):
            _look_at(path)
        tokens = _generate(path, one.sound.name)
    except UserError as error:
        return "refused", str(error)[:300]
    except MemoryError as error:
        return "fault", f"memory: {_short(error)}"
    except Exception as error:
        return "fault", _short(error)
    if not all(0 <= token < 2**31 for token in tokens):
        return "fault", f"tokens {tokens}"
    if one.harmless and tokens != one.sound.tokens:
        return "fault", f"loaded, and says {tokens} instead of {one.sound.tokens}"
    return "loaded", ""


def _load(path: Path, name: str) -> SiriusModel:
    """Loads: by the entries, or by the whole period where the file has one and its size is odd."""
    from sirius_runtime import load

    period = name.endswith("-period") and path.stat().st_size % 2
    model = load(
        path, device="cpu", backend="period" if period else "eager", progress=lambda _: None
    )
    if model.chat is not None:
        model.chat.render([{"role": "user", "content": "w7"}])
    return model


def _look_at(path: Path) -> None:
    """What other commands do with it."""
    from sirius_runtime.artifact import Artifact
    from sirius_runtime.cli.inspect import describe, read_entry
    from sirius_runtime.cli.inspect_page import page
    from sirius_runtime.cli.verify import to_json, to_text
    from sirius_runtime.verification import verify

    with Artifact.open(path) as artifact:
        lines = describe(artifact.manifest)
        entries = [entry.name for entry in artifact.program.entries]
        graphs = {name: read_entry(artifact, name) for name in entries}
        page(artifact.manifest, lines, graphs).encode()
    found = verify(path)
    json.dumps([to_text(found), to_json(found)])


def _generate(path: Path, name: str) -> list[int]:
    """Loads, encodes a text and generates."""
    model = _load(path, name)
    if model.tokenizer is not None:
        model.encode(TEXT)
    period = None if model.backend.limits is not None else 3
    output = model.generate(input_ids=[PROMPT], max_new_tokens=3, period=period, fallback=False)
    return list(output.tokens[0])


def corpus(names: Sequence[str] = ()) -> list[str]:
    """The golden artifacts that PyTorch runs, of the newest version of each kind; of these names,
    or all.
    """
    newest = {name.partition("/")[2]: name for name in kept()}
    able = {own: name for own, name in newest.items() if not own.endswith("-onnx")}
    return [name for own, name in able.items() if not names or own in names]


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _short(error: BaseException) -> str:
    places = [
        f"{Path(frame.filename).name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)[-4:]
    ]
    return f"{type(error).__name__}: {str(error)[:200]} at {' '.join(places)}"


def alone(case: int) -> None:
    """Runs one case here, with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        sound = {
            name: Sound.read(name, path := unpack(name, Path(folder)), _generate(path, name))
            for name in corpus()
        }
        one = changed(case, tuple(KINDS), sound)
        print(one.what)
        path = Path(folder) / "changed.sirius"
        path.write_bytes(one.content)
        print(_generate(path, one.sound.name), "instead of", one.sound.tokens)


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "--child":
        first, count, what, folder = arguments[1:]
        child(int(first), int(count), Hunt.from_json(what), Path(folder))
    elif len(arguments) == 1:
        alone(int(arguments[0]))
    else:
        first, count, *kinds = arguments
        report = hunt(int(first), int(count), Hunt(kinds=tuple(kinds) or tuple(KINDS)))
        print(*(f"{n:6} {what}" for what, n in sorted(report.outcomes.items())), sep="\n")
        print(*report.faults, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
