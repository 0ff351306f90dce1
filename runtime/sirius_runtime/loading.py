"""`load`: opens an artifact and returns a model that generates.

A back end's packages are imported when it is asked for, so that ONNX Runtime needs no PyTorch.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from sirius_runtime.artifact import Artifact
from sirius_runtime.chat import CHAT, Chat
from sirius_runtime.command_line import tell
from sirius_runtime.decoder import Backend
from sirius_runtime.errors import ArtifactError, BackendError, ConfigError, shown
from sirius_runtime.forking import ran_on
from sirius_runtime.model import SiriusModel
from sirius_runtime.spec import JSON, DType, ProgramSpec
from sirius_runtime.terminal import plain
from sirius_runtime.text import read_tokenizer
from sirius_runtime.threads import check_threads
from sirius_runtime.tiers.budget import read_size
from sirius_runtime.tokenizer_guard import check_tokenizer, guarded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sirius_runtime.backends.eager import EagerBackend

TOKENIZER = "tokenizer/tokenizer.json"
PERIOD = "period"


def _to_stderr(message: str) -> None:
    tell(f"sirius: {plain(message)}")


class BackendName(StrEnum):
    """The back ends that `load` knows."""

    AUTO = "auto"
    """The back end that `choose_backend` takes: the fastest that works here."""
    EAGER = "eager"
    """The entries, operator by operator; `by_entries` drafts, verifies and commits."""
    INDUCTOR = "inductor"
    """The entries, compiled by torch.compile on first use: needs a C++ compiler or Triton."""
    CUDAGRAPH = "cudagraph"
    """As `inductor`, with whole periods recorded as CUDA graphs. Needs a CUDA GPU."""
    PERIOD = "period"
    """The graph `period`, operator by operator."""
    AOTI = "aoti"
    """The graph `period`, compiled by AOTInductor once, for a number of rows and cache slots: for
    embedding without Python."""
    ONNXRUNTIME = "onnxruntime"
    """The ONNX graphs, run by ONNX Runtime: a period is one call. Needs no PyTorch."""


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: DType | str | None = None,
    backend: BackendName | str = BackendName.EAGER,
    rows: int = 1,
    context: int | None = None,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    verify: bool = True,
    copy: bool = False,
    memory_budget: int | str | None = None,
    progress: Callable[[str], None] = _to_stderr,
) -> SiriusModel:
    """Loads an artifact.

    Weights are used in place, mapped from the file, where `device` is the CPU and `dtype` the
    stored one; otherwise they are converted once. device: by default a GPU if there is one. dtype:
    by default the stored one. backend: a `BackendName`; ``auto`` takes the fastest that works here.
    rows, context: for backend `aoti`, the largest batch and the most tokens of prompt and answer to
    compile for; by default one row and the model's longest sequence. providers: for backend
    `onnxruntime`, its execution providers in order of preference; by default CUDA where it works,
    else the CPU. That back end computes on the provider's device, in the stored dtype. verify:
    check the sha256 of the weights too (everything else is always checked). progress: is called
    with a line of text: which back end or provider is chosen, and when a back end compiles.

    threads: threads of one operator on the CPU. Default: as many as PyTorch or ONNX Runtime takes.
    The limit is the number of cores, or 16 per core up to 256, whichever is greater. PyTorch's is a
    setting of the whole process (`torch.set_num_threads`), which outlives the model. If torch is
    not imported yet, OMP_WAIT_POLICY is set so that its idle threads sleep, which leaves the cores
    to our kernels. A process that was forked after something was generated on several threads can't
    generate on several threads: start it by spawn.

    copy: read the whole file into memory once; later changes to the file then have no effect. A
    mapped file must not be written to while the model is in use. `generate` compares its size and
    modification time before and after, and raises ArtifactError if they have changed. A file that
    is truncated in between kills the process (SIGBUS). Removing the file, or renaming another over
    it (as sirius-compile does), has no effect.

    memory_budget: limit of the process's memory, in bytes or as a text such as ``6GiB``. Weights
    that do not fit stay in the file; each pass reads them by direct I/O, ahead of the calls that
    need them (docs/offload.md). The budget includes the caches of `rows` rows of `context` tokens
    (prompt and answer; default 2048). Only for backend eager, in the stored dtype. On a device
    other than the CPU it limits the device memory that the model takes, and the other weights are
    streamed from the host's memory.

    Raises ArtifactError for a file that is not a sound artifact, ConfigError for an option that is
    out of range or not supported, and BackendError for a back end that can't run here. Each message
    has the remedy.
    """
    _check_backend(backend, rows, threads)
    if "torch" not in sys.modules:
        let_threads_sleep()
    if dtype is not None and dtype not in list(DType):
        raise ConfigError(f"dtype must be one of {', '.join(DType)}, got {dtype!r}")
    budget = None if memory_budget is None else read_size(memory_budget, "memory_budget")
    if budget is not None and copy:
        raise ConfigError("copy reads the whole file into memory: leave it out, or memory_budget")
    with Artifact.open(
        path, verify=verify and budget is None, copy=copy, weights_later=True
    ) as artifact:
        runner: Backend
        if budget is not None and backend == BackendName.AUTO:
            backend = BackendName.EAGER
        if budget is not None and backend != BackendName.EAGER:
            raise ConfigError(
                f"backend {backend} keeps all weights in memory: use backend eager, or leave out "
                "memory_budget"
            )
        # First: for a moment, reading it takes 130 MiB that the rest is then loaded into.
        tokenizer = None
        if artifact.names(TOKENIZER):
            tokenizer = _tokenizer(artifact.read_bytes(TOKENIZER), path)
            _trim()
        chat = None
        if artifact.names(CHAT):
            chat = _chat(artifact.read_json(CHAT), path)
        if backend == BackendName.AUTO:
            choice = choose_backend(artifact.names("graphs/"), artifact.names("onnx/"), device)
            progress(f"backend {choice.backend}: {choice.reason}")
            backend = choice.backend
        if backend == BackendName.ONNXRUNTIME:
            from sirius_runtime.backends.onnx import OnnxBackend

            _check_onnx(artifact, device, dtype)
            runner = OnnxBackend(artifact, providers=providers, threads=threads, progress=progress)
        else:
            _check_torch(artifact, providers)
            from sirius_runtime.dtypes import dtype_of
            from sirius_runtime.graph_check import check_entries

            set_threads(threads)
            program = artifact.program
            check_entries(program)
            place, stored = find_device(device), program.model.dtype
            if budget is not None:
                from sirius_runtime.backends.tiered import load_tiered

                check_budgeted(artifact, place, dtype, context)
                runner = load_tiered(
                    artifact,
                    device=place,
                    budget=budget,
                    context=context,
                    rows=rows,
                    verify=verify,
                )
            else:
                runner = make_backend(
                    backend,
                    program,
                    lambda name: artifact.read_json(f"graphs/{name}.json"),
                    artifact.weights(),
                    dtype=dtype_of(dtype or stored),
                    device=place,
                    rows=rows,
                    context=context,
                    progress=progress,
                )
            if dtype not in (None, stored):
                ran_on(runner.threads)  # converting the weights ran on them
        artifact.check_weights()
        artifact.check_unchanged()
        return SiriusModel(runner, tokenizer, artifact.file, chat)


def check_budgeted(
    artifact: Artifact, device: torch.device, dtype: DType | str | None, context: int | None
) -> None:
    """Raises ConfigError or BackendError where these options do not allow a memory budget."""
    from sirius_runtime.graph_check import check_entries

    _check_torch(artifact, None)
    program = artifact.program
    stored, longest = program.model.dtype, program.model.max_seq_len
    if dtype not in (None, stored):
        raise ConfigError(
            f"with a memory budget, weights are used as they are stored, in {stored}, not {dtype}: "
            f"leave out dtype, or compile with --dtype {dtype}"
        )
    if context is not None and not 2 <= context <= longest:
        raise ConfigError(f"context must be in 2..{longest} (max_seq_len), got {context}")
    if program.nested:
        _check_nested(BackendName.EAGER, device)
    check_entries(program)


def make_backend(
    backend: BackendName | str,
    program: ProgramSpec,
    document: Callable[[str], JSON],
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    rows: int = 1,
    context: int | None = None,
    progress: Callable[[str], None] = _to_stderr,
) -> EagerBackend:
    """The PyTorch back end of that name. document: returns an entry's graph document. The other
    arguments are those of `load`.
    """
    from sirius_runtime.backends.eager import EagerBackend
    from sirius_runtime.backends.period import AotiBackend, PeriodBackend

    _check_backend(backend, rows)
    if backend == BackendName.AUTO:
        choice = choose_backend(True, False, device)
        progress(f"backend {choice.backend}: {choice.reason}")
        backend = choice.backend
    if program.nested:
        _check_nested(backend, device)
    if backend == BackendName.ONNXRUNTIME:
        raise ConfigError(
            "backend onnxruntime runs the ONNX graphs of an artifact: compile with graphs onnx or "
            "both, save it, and load the file"
        )
    whole = backend in (BackendName.PERIOD, BackendName.AOTI)  # the others don't load that graph
    names = [e.name for e in program.entries if whole or e.name != PERIOD]
    if whole and PERIOD not in names:
        raise BackendError(
            f"backend {backend} runs whole periods as one graph, and the artifact holds none: use "
            "backend eager or inductor, or compile it with sirius-compile --graphs torch"
        )
    documents = {name: document(name) for name in names}
    if backend == BackendName.EAGER:
        return EagerBackend(program, documents, weights, dtype=dtype, device=device)
    if not whole:
        from sirius_runtime.backends.cuda_graph import CudaGraphBackend
        from sirius_runtime.backends.inductor import InductorBackend

        kind = InductorBackend if backend == BackendName.INDUCTOR else CudaGraphBackend
        return kind(program, documents, weights, dtype=dtype, device=device, progress=progress)
    if backend == BackendName.PERIOD:
        return PeriodBackend(program, documents, weights, dtype=dtype, device=device)
    longest = program.model.max_seq_len
    if context is not None and not 2 <= context <= longest:
        raise ConfigError(f"context must be in 2..{longest} (max_seq_len), got {context}")
    return AotiBackend(
        program,
        documents,
        weights,
        dtype=dtype,
        device=device,
        rows=rows,
        context=context or longest,
        progress=progress,
    )


def _check_nested(backend: str, device: torch.device) -> None:
    """Raises BackendError where a back end or device can't read nested weights."""
    if device.type not in ("cpu", "cuda"):
        raise BackendError(
            "nested weights (--weights int8) are read on the CPU and on CUDA GPUs, not on device "
            f"{device}: pass device cpu, or compile without --weights int8"
        )
    if backend not in (BackendName.EAGER, BackendName.PERIOD):
        raise BackendError(
            f"backend {backend} does not read nested weights (--weights int8) yet: use backend "
            "eager or period, or compile without --weights int8"
        )


@dataclass(frozen=True)
class Choice:
    """A back end, and why it was chosen."""

    backend: BackendName
    reason: str


def choose_backend(
    graphs: object, onnx: object, device: str | torch.device | None = None
) -> Choice:
    """The back end that ``auto`` stands for; always the same on one machine.

    graphs, onnx: whether (by truth value) the artifact holds PyTorch graphs, and ONNX graphs.
    device: as for `load`. On the CPU the operators' kernels do most of the work in every back end,
    so `eager` is chosen, which needs no compilation.
    """
    if not graphs:
        return Choice(BackendName.ONNXRUNTIME, "the artifact holds ONNX graphs only")
    if find_spec("torch") is None:
        if onnx:
            return Choice(BackendName.ONNXRUNTIME, "PyTorch is not installed")
        # `eager` then raises an error that names PyTorch.
        return Choice(BackendName.EAGER, "the artifact holds no ONNX graphs")
    found = find_device(device)
    if found.type == "cuda":
        if find_spec("triton") is not None:
            return Choice(BackendName.CUDAGRAPH, "a CUDA GPU, and Triton to compile for it")
        return Choice(BackendName.EAGER, "a CUDA GPU, but no Triton to compile for it")
    if found.type != "cpu":
        return Choice(BackendName.EAGER, f"device {found}")
    from sirius_runtime.kernels.native import kernels

    if kernels() is None:
        return Choice(BackendName.EAGER, "the CPU, without kernels")
    return Choice(BackendName.EAGER, "the CPU, with kernels")


def set_threads(threads: int | None) -> None:
    """Sets the threads of one PyTorch operator, which our kernels use too, for the whole process.
    Raises ConfigError for more threads than this machine may start.
    """
    if threads is not None:
        import torch

        check_threads(threads)

        torch.set_num_threads(threads)


def _check_backend(backend: str, rows: int, threads: int | None = None) -> None:
    if backend not in list(BackendName):
        raise ConfigError(f"backend must be one of {', '.join(BackendName)}, got {backend!r}")
    if rows < 1:
        raise ConfigError(f"rows must be >= 1, got {rows}")
    if threads is not None:
        check_threads(threads)


def let_threads_sleep() -> None:
    """Makes OpenMP's threads sleep between torch's operators, unless the environment says
    otherwise.

    By default they spin for some milliseconds, on the cores that the kernels' threads need. The
    variable is read when torch is first imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _check_onnx(
    artifact: Artifact, device: str | torch.device | None, dtype: DType | str | None
) -> None:
    stored = artifact.program.model.dtype
    if dtype not in (None, stored):
        raise ConfigError(
            f"backend onnxruntime computes in the dtype of its graphs, {stored}, got {dtype!r}; "
            f"leave dtype out, or compile with --dtype {dtype}"
        )
    if device is not None:
        raise ConfigError(
            f"backend onnxruntime takes providers, not a device (got {str(device)!r}); pass "
            "providers=['CPUExecutionProvider'] or ['CUDAExecutionProvider']"
        )


def _check_torch(artifact: Artifact, providers: Sequence[str] | None) -> None:
    if providers is not None:
        raise ConfigError(
            "providers are an option of backend onnxruntime only: choose that back end, or leave "
            "them out"
        )
    if not artifact.names("graphs/"):
        raise BackendError(
            f"{artifact.path} holds ONNX graphs only: use backend onnxruntime, or compile it with "
            "sirius-compile --graphs both"
        )
    try:
        import torch  # noqa: F401  (the back ends' own)
    except ImportError as error:
        raise BackendError(
            f"this back end needs PyTorch ({error}); pip install torch, or use backend onnxruntime"
        ) from error


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; for None, a GPU if there is one, else the CPU. Raises ConfigError
    for a device that can't be used here.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deprecated device names
            found = torch.device(device)
            torch.ones(1, device=found).item()  # some devices only pretend to hold values
    except (RuntimeError, AssertionError, ImportError, TypeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ConfigError(
            f"device {shown(str(device))} can't be used here ({reason:.200}); leave it out, or use "
            "cpu"
        ) from error
    return found


def _tokenizer(content: bytes, path: str | Path) -> Tokenizer:
    try:
        check_tokenizer(content)
    except ArtifactError as error:
        raise ArtifactError(
            f"{path}: {TOKENIZER} is refused: {error}; compile the model again, with the tokenizer "
            "that belongs to it"
        ) from error
    try:
        with guarded():  # its panics are BaseExceptions
            return read_tokenizer(content)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ArtifactError(
            f"{path}: {TOKENIZER} can't be read by this version of tokenizers ({error}); "
            "update the tokenizers package, or compile the model again"
        ) from error


try:
    # At import, so that reading an artifact opens no library (tests/test_fuzz.py watches for that).
    _malloc_trim: Callable[[int], int] | None = ctypes.CDLL(None).malloc_trim
except (AttributeError, OSError, TypeError):  # not glibc
    _malloc_trim = None


def _trim() -> None:
    """Gives freed memory back to the system, where the C library can: reading a tokenizer of
    150,000 tokens leaves 80 MiB of it.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def _chat(document: JSON, path: str | Path) -> Chat | None:
    try:
        return Chat.read(document)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {CHAT} is malformed ({error}); compile it again") from error
