"""Puts all of a tokenizer's added tokens into its `tokenizer.json`.

transformers also adds the tokens that other files declare. The runtime reads `tokenizer.json`
alone, and would split such a token into its characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tokenizers import AddedToken

from sirius_runtime.errors import UnsupportedModelError, shown
from sirius_runtime.spec import JSON
from sirius_runtime.text import read_tokenizer

TOKENIZER = "tokenizer.json"
CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
"""Other files that may declare tokens."""

_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class _Declared:
    """A token, the file that declares it, and its id if the file gives one.

    `overrides`: whether its flags override the flags that `tokenizer.json` gives the token.
    """

    token: AddedToken
    file: str
    id: int | None = None
    overrides: bool = False


def complete(files: Mapping[str, bytes]) -> bytes:
    """The `tokenizer.json` of `files`, with the tokens that the other files declare.

    As in transformers, ids in `tokenizer.json` take precedence. Raises UnsupportedModelError for
    files that can't be read, and for a token that can't get its declared id because the ids before
    it are missing.
    """
    try:
        tokenizer = read_tokenizer(files[TOKENIZER])
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UnsupportedModelError(
            f"{TOKENIZER} can't be read by this version of tokenizers ({error}); update the "
            "tokenizers package, or download the model again"
        ) from error
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    missing = []
    for declared in _declared(files):
        token = declared.token
        old = known.get(token.content)
        if token.content and (old is None or (declared.overrides and repr(old) != repr(token))):
            known[token.content] = token
            missing.append(declared)
    if not missing:
        return files[TOKENIZER]
    missing.sort(key=lambda declared: (declared.id is None, declared.id or 0))
    for declared in missing:
        token, known_id = declared.token, tokenizer.token_to_id(declared.token.content)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        found = tokenizer.token_to_id(token.content)
        if known_id is None and declared.id not in (None, found):
            raise UnsupportedModelError(
                f"{declared.file} declares token {shown(token.content)} with id {declared.id}, but "
                f"the next free id in {TOKENIZER} is {found}. Declare the tokens between them, or "
                "load the tokenizer with transformers, check its ids and save it to the directory"
            )
    return tokenizer.to_str().encode()


def _declared(files: Mapping[str, bytes]) -> Iterator[_Declared]:
    """The tokens that other files declare; declarations that list all flags come first."""
    documents = {name: read_file(files, name) for name in (CONFIG, SPECIAL, ADDED)}
    named = [
        _Declared(_token(value, file, special=True), file)
        for file in (CONFIG, SPECIAL)
        for value in _named(documents[file])
    ]
    special = {declared.token.content for declared in named}
    for id, fields in _items(documents[CONFIG].get("added_tokens_decoder"), CONFIG):
        token = _token(fields, CONFIG, special=content_of(fields, CONFIG) in special)
        yield _Declared(token, CONFIG, _id(id, CONFIG), overrides=True)
    for content, id in _items(documents[ADDED], ADDED):
        yield _Declared(_token(content, ADDED, special=content in special), ADDED, _id(id, ADDED))
    yield from named


def _named(document: Mapping[str, JSON]) -> Iterator[JSON]:
    """The special tokens of a file that names them (``eos_token``, …) or lists them."""
    for key, value in document.items():
        if key in _LISTS and isinstance(value, list | dict):
            yield from value.values() if isinstance(value, dict) else value
        elif key.endswith("_token") and isinstance(value, str | dict):
            yield value


def read_file(files: Mapping[str, bytes], name: str) -> dict[str, JSON]:
    """A file's JSON object; empty if there is no such file."""
    try:
        document = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise _fault(name, f"is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise _fault(name, f"holds a {type(document).__name__} instead of an object")
    return document


def _items(value: JSON, name: str) -> Iterator[tuple[str, JSON]]:
    if isinstance(value, dict):
        yield from value.items()
    elif value is not None:
        raise _fault(name, f"holds a {type(value).__name__} of tokens instead of an object")


def content_of(value: JSON, name: str) -> str:
    """The text of a token that the file `name` declares, as text or as an object."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise _fault(name, f"declares a token without content ({shown(str(value))})")
    return content


def _token(value: JSON, name: str, *, special: bool) -> AddedToken:
    """A token from its content, or from an object with its content and flags. By default, a token
    that is not special matches normalised text.
    """
    fields = value if isinstance(value, dict) else {}
    flags = {flag: fields[flag] for flag in _FLAGS if isinstance(fields.get(flag), bool)}
    special = special or flags.get("special", False)
    flags = {"normalized": not special, **flags, "special": special}
    return AddedToken(content_of(value, name), **flags)


def _id(value: JSON, name: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise _fault(name, f"gives a token the id {shown(str(value))}") from error


def _fault(name: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} {what}; download the model again")
