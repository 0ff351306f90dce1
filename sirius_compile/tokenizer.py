"""The tokenizer's files, as the artifact carries them: `tokenizer.json` and what belongs to it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sirius_compile.models import ModelSource
from sirius_runtime.errors import UnsupportedModelError

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def tokenizer_files(source: ModelSource | Any) -> Mapping[str, bytes]:
    """The files of a model directory's tokenizer, or of a transformers tokenizer; empty for None.

    A directory without `tokenizer.json` has its tokenizer converted by transformers. Raises
    UnsupportedModelError for one that has no fast form.
    """
    if source is None:
        return {}
    if isinstance(source, ModelSource):
        found = _read(source.directory)
        names = ("tokenizer.model", "vocab.json", "tokenizer_config.json")
        if "tokenizer.json" in found or not any((source.directory / n).exists() for n in names):
            return found
        source = AutoTokenizer.from_pretrained(
            source.directory, trust_remote_code=source.trust_remote_code
        )
    if not getattr(source, "is_fast", False):
        raise UnsupportedModelError(
            f"tokenizer {type(source).__name__} has no fast form (tokenizer.json), which the "
            "runtime needs; convert it with transformers and save it to the model's directory"
        )
    with tempfile.TemporaryDirectory() as folder:
        source.save_pretrained(folder)
        return _read(Path(folder))


def _read(folder: Path) -> dict[str, bytes]:
    return {n: (folder / n).read_bytes() for n in _FILES if (folder / n).exists()}
