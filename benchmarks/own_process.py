"""A model in a process of its own that answers prompts of token ids greedily, one at a time.

The process imports only what its own way of answering needs, so that its resident memory is that
way's: Sirius an artifact, transformers a folder, llama.cpp a GGUF file. Requests and answers are
lines of JSON on stdin and stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sirius_runtime.errors import ConfigError, SiriusError

Generate = Callable[[list[int], int, set[int]], tuple[list[int], float]]
"""Tokens after a prompt, at most so many and up to one of these; and the seconds that all but the
first one took."""

CONTEXT = 1024
"""Tokens of prompt and answer that llama.cpp has room for."""
ROOT = Path(__file__).parents[1]
_SECONDS = 0.01  # between two looks at a process's memory


@dataclass(frozen=True)
class Model:
    """A model and how it answers. kind: a key of `KINDS`. mode: of `SiriusModel.generate`. draft:
    llama.cpp's draft model.
    """

    kind: str
    path: str
    threads: int
    mode: str = "full"
    draft: str | None = None


@dataclass(frozen=True)
class Resident:
    """A process's resident memory in bytes, when it was largest. `mapped` counts the pages of
    mapped files that are in memory, weights and libraries, which the system may drop and other
    processes may share.
    """

    anonymous: int
    mapped: int

    @property
    def both(self) -> int:
        return self.anonymous + self.mapped


class OwnProcess:
    """A model in a process of its own, with its threads as it likes them: asleep between operators
    (OMP_WAIT_POLICY=passive, which is right for ours) they cost llama.cpp up to 17%.
    """

    def __init__(self, model: Model) -> None:
        """Raises ConfigError without the package, the file or the folder."""
        _check(model)
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.own_process", json.dumps(asdict(model))],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._name = f"{model.kind} with {model.path}"

    def generate(
        self, prompt: Sequence[int], new_tokens: int, eos: Collection[int]
    ) -> tuple[list[int], float]:
        """Greedy tokens after a prompt, and the seconds that all but the first one took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(
                json.dumps([list(prompt), new_tokens, sorted(eos)]),
                file=self._process.stdin,
                flush=True,
            )
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ConfigError(f"the process of {self._name} ended: see its message above")
        tokens, seconds = json.loads(line)
        return tokens, seconds

    def resident(self) -> Resident:
        """The memory that it holds now."""
        held = {}
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.startswith("Rss"):
                held[name] = int(value.split()[0]) * 1024
        # Shared memory is no file's, but the kernel counts it apart from anonymous memory.
        # A process that has ended has none of these lines until `close`.
        anonymous = held.get("RssAnon", 0) + held.get("RssShmem", 0)
        return Resident(anonymous, held.get("RssFile", 0))

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def peak(model: Model, prompt: Sequence[int], new_tokens: int, eos: Collection[int]) -> Resident:
    """The most that a process holds while it loads a model and answers one prompt, of all looks
    that are taken every few milliseconds. Raises ConfigError where there is no /proc.
    """
    if not Path("/proc/self/status").exists():
        raise ConfigError("resident memory is read from /proc, which only Linux has")
    process = OwnProcess(model)
    looks = [process.resident()]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SECONDS):
            looks.append(process.resident())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        process.generate(prompt, new_tokens, eos)
    finally:
        ended.set()
        watching.join()
        process.close()
    return max(looks, key=lambda look: look.both)


def _check(model: Model) -> None:
    for file in (model.path, model.draft):
        if file is not None and not Path(file).exists():
            raise ConfigError(
                f"{file}: there is no such file; give the path of a model for {model.kind}"
            )
    if model.kind == LLAMA_CPP:
        from benchmarks import llama_cpp

        if not llama_cpp.available():
            raise ConfigError("llama.cpp is not installed: pip install --group bench")


def _sirius(model: Model) -> Generate:
    import sirius_runtime

    own = sirius_runtime.load(model.path, threads=model.threads)

    def generate(prompt: list[int], new_tokens: int, eos: set[int]) -> tuple[list[int], float]:
        done = own.generate([prompt], mode=model.mode, max_new_tokens=new_tokens)
        tokens = done.tokens[0]
        rate = done.stats.tokens_per_second or float("inf")
        return list(tokens), (len(tokens) - 1) / rate

    return generate


def _llama_cpp(model: Model) -> Generate:
    from benchmarks import llama_cpp

    target = llama_cpp.LlamaCpp(Path(model.path), CONTEXT, model.threads)
    if model.draft is None:
        return lambda prompt, most, eos: llama_cpp.greedy(target, prompt, most, eos)
    draft = llama_cpp.LlamaCpp(Path(model.draft), CONTEXT, model.threads)
    return lambda prompt, most, eos: llama_cpp.speculative(target, draft, prompt, most, eos)


def _transformers(model: Model) -> Generate:
    """AutoModelForCausalLM in bfloat16, with its own `generate` and its own cache."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(model.threads)
    own = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.bfloat16)
    own.generation_config = GenerationConfig()  # the checkpoint's may sample or penalise repetition

    class Clock(BaseStreamer):
        """The first call is the prompt's, the second the first token's."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    @torch.inference_mode()
    def generate(prompt: list[int], new_tokens: int, eos: set[int]) -> tuple[list[int], float]:
        clock, ids = Clock(), torch.tensor([prompt])
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=sorted(eos) or None,
            pad_token_id=min(eos, default=0),
        )
        found = own.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock
        )
        return found[0, len(prompt) :].tolist(), clock.times[-1] - clock.times[1]

    return generate


SIRIUS, TRANSFORMERS, LLAMA_CPP = "sirius", "transformers", "llama.cpp"
KINDS = {SIRIUS: _sirius, TRANSFORMERS: _transformers, LLAMA_CPP: _llama_cpp}


def main() -> int:
    model = Model(**json.loads(sys.argv[1]))
    answers = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no answer
    try:
        generate = KINDS[model.kind](model)
        for line in sys.stdin:
            prompt, new_tokens, eos = json.loads(line)
            print(json.dumps(generate(prompt, new_tokens, set(eos))), file=answers, flush=True)
    except (SiriusError, OSError, ValueError, RuntimeError) as error:
        print(f"{model.kind}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
