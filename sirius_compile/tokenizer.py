"""The tokenizer's files for the artifact: `tokenizer.json` and the files that belong to it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sirius_compile.added_tokens import ADDED, CONFIG, SPECIAL, TOKENIZER, complete
from sirius_compile.chat import TEMPLATE, chat_files
from sirius_compile.models import ModelSource
from sirius_runtime.errors import UnsupportedModelError

_STORED = (TOKENIZER, CONFIG, SPECIAL, TEMPLATE)


def tokenizer_files(source: ModelSource | Any) -> Mapping[str, bytes]:
    """The files of a model directory's tokenizer, or of a transformers tokenizer; empty for None.

    If a directory has no `tokenizer.json`, transformers converts its tokenizer. Tokens that only
    other files declare are added to `tokenizer.json`. The chat templates are one more file, in the
    runtime's format. Raises UnsupportedModelError for a tokenizer that has no fast form or can't be
    read, and for tokens that can't get their declared ids.
    """
    if source is None:
        return {}
    if isinstance(source, ModelSource):
        found = _read(source.directory, _STORED)
        if TOKENIZER in found:
            declaring = _read(source.directory, (ADDED,))
            whole = {**found, TOKENIZER: complete({**found, **declaring})}
            return whole | chat_files(source.directory, found)
        names = ("tokenizer.model", "vocab.json", CONFIG)
        if not any((source.directory / n).exists() for n in names):
            return found
        source = _converted(source)
    if not getattr(source, "is_fast", False):
        raise UnsupportedModelError(
            f"tokenizer {type(source).__name__} has no fast form (tokenizer.json), which the "
            "runtime needs. Convert the tokenizer with transformers and save it to the model's "
            "directory"
        )
    with tempfile.TemporaryDirectory() as folder:
        source.save_pretrained(folder)
        found = _read(Path(folder), _STORED)
        return found | chat_files(Path(folder), found)


def _converted(source: ModelSource) -> Any:
    """The tokenizer that transformers converts from files in another format."""
    try:
        return AutoTokenizer.from_pretrained(
            source.directory, trust_remote_code=source.trust_remote_code
        )
    except Exception as error:  # bad files may raise any exception in transformers
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"{source.name}: transformers can't read its tokenizer ({reason:.200}); save it again "
            "as tokenizer.json, or remove its files to compile without one"
        ) from error


def _read(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    return {n: (folder / n).read_bytes() for n in names if (folder / n).exists()}
