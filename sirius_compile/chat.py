"""Collects a tokenizer's chat templates into the one file that the runtime reads.

transformers looks for templates in a file, in a folder of files, and in the tokenizer's config. The
runtime's format is `sirius_runtime.chat.ChatSpec`.
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
_OF_PROCESSOR = "chat_template.json"  # the processor's file, in a multimodal checkpoint
_NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


def chat_files(folder: Path, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The runtime's file of a tokenizer's chat templates; empty if the tokenizer has none.

    `files`: the files of `folder` that have been read. Raises UnsupportedModelError for templates
    that can't be read.
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
    """The templates by name. Template files take precedence over the config, as in transformers."""
    paths = {DEFAULT: folder / TEMPLATE}
    paths |= {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    found = {name: _text(path) for name, path in paths.items() if path.is_file()}
    if found:
        return found
    declared = config.get("chat_template")
    if declared is None and (folder / _OF_PROCESSOR).is_file():
        content = (folder / _OF_PROCESSOR).read_bytes()
        declared = read_file({_OF_PROCESSOR: content}, _OF_PROCESSOR).get("chat_template")
    if isinstance(declared, list):
        declared = {
            one.get("name"): one.get("template")
            for one in declared
            if isinstance(one, dict) and isinstance(one.get("name"), str)
        }
    if declared is None:
        return {}
    return declared if isinstance(declared, dict) else {DEFAULT: declared}


def _special_tokens(files: Mapping[str, bytes], config: Mapping[str, JSON]) -> dict[str, str]:
    declared = dict(config)
    if "added_tokens_decoder" not in config:  # the older form
        declared |= read_file(files, SPECIAL)
    given = {name: declared[name] for name in _NAMED if declared.get(name) is not None}
    return {name: content_of(value, CONFIG) for name, value in given.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            f"{path} can't be read ({error}); download the model again, or remove the file to "
            "compile without a chat template"
        ) from error
