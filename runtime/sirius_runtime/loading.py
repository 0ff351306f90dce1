"""`load`: from an artifact's file to a model that generates."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import torch
from tokenizers import Tokenizer

from sirius_runtime.artifact import Artifact
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.errors import ArtifactError, ConfigError
from sirius_runtime.model import SiriusModel
from sirius_runtime.spec import DType
from sirius_runtime.text import read_tokenizer

TOKENIZER = "tokenizer/tokenizer.json"


class BackendName(StrEnum):
    """The back ends that `load` knows."""

    EAGER = "eager"


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: DType | str | None = None,
    backend: BackendName | str = BackendName.EAGER,
    verify: bool = True,
) -> SiriusModel:
    """Loads an artifact.

    Weights are used in place, mapped from the file, where `device` is the CPU and `dtype` the
    stored one; otherwise they are converted once. device: by default a GPU if there is one. dtype:
    by default the stored one. verify: check the sha256 of the weights too (everything else is
    always checked).

    Raises ArtifactError for a file that is not a sound artifact and ConfigError for an option that
    can't be met, each with the remedy.
    """
    if backend not in list(BackendName):
        raise ConfigError(f"backend must be one of {', '.join(BackendName)}, got {backend!r}")
    if dtype is not None and dtype not in list(DType):
        raise ConfigError(f"dtype must be one of {', '.join(DType)}, got {dtype!r}")
    with Artifact.open(path, verify=verify) as artifact:
        program = artifact.program
        runner = EagerBackend(
            program,
            {e.name: artifact.read_json(f"graphs/{e.name}.json") for e in program.entries},
            artifact.weights(),
            dtype=dtype_of(dtype or program.model.dtype),
            device=find_device(device),
        )
        tokenizer = None
        if artifact.names(TOKENIZER):
            tokenizer = _tokenizer(artifact.read_bytes(TOKENIZER), path)
        return SiriusModel(runner, tokenizer)


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, a GPU if there is one for None; ConfigError where it has none."""
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
