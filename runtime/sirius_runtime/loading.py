"""`load`: from an artifact's file to a model that generates.

What a back end needs is imported when one is asked for: by ONNX Runtime, without PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from sirius_runtime.artifact import Artifact
from sirius_runtime.decoder import Engine
from sirius_runtime.errors import ArtifactError, BackendError, ConfigError
from sirius_runtime.model import SiriusModel
from sirius_runtime.spec import JSON, DType, ProgramSpec
from sirius_runtime.text import read_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sirius_runtime.backends.eager import EagerBackend

TOKENIZER = "tokenizer/tokenizer.json"
PERIOD = "period"


def _to_stderr(message: str) -> None:
    print(f"sirius: {message}", file=sys.stderr)  # noqa: T201  (a minute of silence is no answer)


class BackendName(StrEnum):
    """The back ends that `load` knows."""

    EAGER = "eager"
    """The entries, operator by operator; the Session drafts, verifies and commits."""
    PERIOD = "period"
    """The graph `period`, operator by operator."""
    AOTI = "aoti"
    """The graph `period`, compiled by AOTInductor once, for a number of rows and cache slots."""
    ONNXRUNTIME = "onnxruntime"
    """The ONNX graphs, by ONNX Runtime: a period is one call. Needs no PyTorch."""


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
    progress: Callable[[str], None] = _to_stderr,
) -> SiriusModel:
    """Loads an artifact.

    Weights are used in place, mapped from the file, where `device` is the CPU and `dtype` the
    stored one; otherwise they are converted once. device: by default a GPU if there is one. dtype:
    by default the stored one. rows, context: of backend `aoti`, the largest batch and the most
    tokens of prompt and answer to compile for, by default the model's longest sequence; progress is
    told when it compiles, which happens once. providers, threads: of backend `onnxruntime`, its
    execution providers in order of preference, by default CUDA where it works and the CPU else
    (progress is told which), and the threads of one operator; it computes on the device of the
    provider, in the stored dtype. verify: check the sha256 of the weights too (everything else is
    always checked).

    Raises ArtifactError for a file that is not a sound artifact and ConfigError for an option that
    can't be met, each with the remedy.
    """
    _check_backend(backend, rows)
    if dtype is not None and dtype not in list(DType):
        raise ConfigError(f"dtype must be one of {', '.join(DType)}, got {dtype!r}")
    with Artifact.open(path, verify=verify) as artifact:
        runner: Engine
        if backend == BackendName.ONNXRUNTIME:
            from sirius_runtime.backends.onnx import OnnxBackend

            _check_onnx(artifact, device, dtype)
            runner = OnnxBackend(artifact, providers=providers, threads=threads, progress=progress)
        else:
            _check_torch(artifact, providers, threads)
            from sirius_runtime.dtypes import dtype_of

            program = artifact.program
            runner = make_backend(
                backend,
                program,
                lambda name: artifact.read_json(f"graphs/{name}.json"),
                artifact.weights(),
                dtype=dtype_of(dtype or program.model.dtype),
                device=find_device(device),
                rows=rows,
                context=context,
                progress=progress,
            )
        tokenizer = None
        if artifact.names(TOKENIZER):
            tokenizer = _tokenizer(artifact.read_bytes(TOKENIZER), path)
        return SiriusModel(runner, tokenizer)


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
    """PyTorch's back end of that name; `document` gives an entry's graph, the rest is as for
    `load`.
    """
    from sirius_runtime.backends.eager import EagerBackend
    from sirius_runtime.backends.period import AotiBackend, PeriodBackend

    _check_backend(backend, rows)
    if backend == BackendName.ONNXRUNTIME:
        raise ConfigError(
            "backend onnxruntime runs the ONNX graphs of an artifact: compile with backend onnx or "
            "both, save it, and load the file"
        )
    eager = backend == BackendName.EAGER  # has no use for the graph of a whole period
    names = [e.name for e in program.entries if not eager or e.name != PERIOD]
    documents = {name: document(name) for name in names}
    if eager:
        return EagerBackend(program, documents, weights, dtype=dtype, device=device)
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


def _check_backend(backend: str, rows: int) -> None:
    if backend not in list(BackendName):
        raise ConfigError(f"backend must be one of {', '.join(BackendName)}, got {backend!r}")
    if rows < 1:
        raise ConfigError(f"rows must be >= 1, got {rows}")


def _check_onnx(
    artifact: Artifact, device: str | torch.device | None, dtype: DType | str | None
) -> None:
    stored = artifact.program.model.dtype
    if dtype not in (None, stored):
        raise ConfigError(
            f"backend onnxruntime computes in the dtype that its graphs have, {stored}, got "
            f"{dtype!r}; leave dtype out, or compile with --dtype {dtype}"
        )
    if device is not None:
        raise ConfigError(
            f"backend onnxruntime takes providers, not a device (got {str(device)!r}); pass "
            "providers=['CPUExecutionProvider'] or ['CUDAExecutionProvider']"
        )


def _check_torch(artifact: Artifact, providers: Sequence[str] | None, threads: int | None) -> None:
    if providers is not None or threads is not None:
        raise ConfigError("providers and threads are options of backend onnxruntime alone")
    if not artifact.names("graphs/"):
        raise BackendError(
            f"{artifact.path} holds ONNX graphs only: use backend onnxruntime, or compile it with "
            "sirius-compile --backend both"
        )
    try:
        import torch  # noqa: F401  (the back ends' own)
    except ImportError as error:
        raise BackendError(
            f"this back end needs PyTorch ({error}); pip install torch, or use backend onnxruntime"
        ) from error


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, a GPU if there is one for None; ConfigError where it has none."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device {str(device)!r} can't be used here ({reason}); leave it out, or use cpu"
        ) from error
    return found


def _tokenizer(content: bytes, path: str | Path) -> Tokenizer:
    try:
        return read_tokenizer(content)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ArtifactError(
            f"{path}: {TOKENIZER} can't be read by this version of tokenizers ({error}); "
            "update the tokenizers package, or compile the model again"
        ) from error
