"""Collects a tokenizer's chat templates into the one file that the runtime reads.

transformers looks for them in a file, in a folder of files, and in the tokenizer's config. The
runtime's form is `sirius_runtime.chat.ChatSpec`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from sirius_compile.added_tokens import CONFIG, SPECIAL, content_of, read_file
from sirius_runtime.chat import CHAT, DEFAULT, Chat, ChatSpec
from sirius_runtime.errors import ArtifactError, UnsupportedModelError
from sirius_runtime.spec import JSON, to_json

TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
CHAT_FILE = PurePosixPath(CHAT).name
_OF_PROCESSOR = "chat_template.json"  # of a multimodal checkpoint
_NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


def chat_files(folder: Path, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The runtime's file of a tokenizer's chat templates; empty if it has none.

    files: those of `folder` that are read already. Raises UnsupportedModelError for templates that
    can't be read.
    """
    config = read_file(files, CONFIG)
    spec = ChatSpec(_templates(folder, config), _special_tokens(files, config))
    if not spec.templates:
        return {}
    document = to_json(spec)
    try:
        Chat.read(document)
    except ArtifactError as error:
        raise UnsupportedModelError(
            f"{folder}: its chat templates can't be used ({error}); fix {TEMPLATE}, or the "
            f"chat_template of {CONFIG}"
        ) from error
    return {CHAT_FILE: json.dumps(document, ensure_ascii=False).encode()}


def _templates(folder: Path, config: Mapping[str, JSON]) -> dict[str, str]:
    """Template files take precedence over the config, as in transformers."""
    paths = {DEFAULT: folder / TEMPLATE}
    paths |= {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    found = {name: _text(path) for name, path in paths.items() if path.is_file()}
    if found:
        return found
    said = config.get("chat_template")
    if said is None and (folder / _OF_PROCESSOR).is_file():
        said = read_file({_OF_PROCESSOR: (folder / _OF_PROCESSOR).read_bytes()}, _OF_PROCESSOR).get(
            "chat_template"
        )
    if isinstance(said, list):
        said = {
            one.get("name"): one.get("template")
            for one in said
            if isinstance(one, dict) and isinstance(one.get("name"), str)
        }
    return {} if said is None else said if isinstance(said, dict) else {DEFAULT: said}


def _special_tokens(files: Mapping[str, bytes], config: Mapping[str, JSON]) -> dict[str, str]:
    said = dict(config)
    if "added_tokens_decoder" not in config:  # the older form
        said |= read_file(files, SPECIAL)
    given = {name: said[name] for name in _NAMED if said.get(name) is not None}
    return {name: content_of(value, CONFIG) for name, value in given.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            f"{path} can't be read ({error}); download the model again, or remove the file to "
            "compile without a chat template"
        ) from error
