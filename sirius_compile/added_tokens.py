"""The added tokens of a tokenizer, all of them in its `tokenizer.json`.

transformers adds what the files beside it declare when it loads them; the runtime reads that one
file, and would take such a token for its characters.
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
"""Files beside it that may declare tokens."""

_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class _Declared:
    """A token, the file that declares it, and its id where that says one. `counts`: more than what
    `tokenizer.json` says of it.
    """

    token: AddedToken
    file: str
    id: int | None = None
    counts: bool = False


def complete(files: Mapping[str, bytes]) -> bytes:
    """The `tokenizer.json` among `files` with the tokens that the others declare.

    As in transformers, the ids that it has itself are the ones that count. Raises
    UnsupportedModelError for files that can't be read, and for a token that can't have the id that
    it is declared with: ids of added tokens follow each other.
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
        own = known.get(token.content)
        if token.content and (own is None or (declared.counts and repr(own) != repr(token))):
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
                f"in {TOKENIZER} the next free id is {found}: declare the tokens between, or "
                "load the tokenizer with transformers, check its ids and save it to the directory"
            )
    return tokenizer.to_str().encode()


def _declared(files: Mapping[str, bytes]) -> Iterator[_Declared]:
    """The tokens that stand beside `tokenizer.json`; those with all of their flags first."""
    documents = {name: read_file(files, name) for name in (CONFIG, SPECIAL, ADDED)}
    named = [
        _Declared(_token(value, file, special=True), file)
        for file in (CONFIG, SPECIAL)
        for value in _named(documents[file])
    ]
    special = {declared.token.content for declared in named}
    for id, fields in _items(documents[CONFIG].get("added_tokens_decoder"), CONFIG):
        token = _token(fields, CONFIG, special=content_of(fields, CONFIG) in special)
        yield _Declared(token, CONFIG, _id(id, CONFIG), counts=True)
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
    """A file's object; empty where there is no such file."""
    try:
        document = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise _fault(name, f"is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise _fault(name, f"holds a {type(document).__name__} where an object belongs")
    return document


def _items(value: JSON, name: str) -> Iterator[tuple[str, JSON]]:
    if isinstance(value, dict):
        yield from value.items()
    elif value is not None:
        raise _fault(name, f"holds a {type(value).__name__} of tokens where an object belongs")


def content_of(value: JSON, name: str) -> str:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise _fault(name, f"declares a token without content ({shown(str(value))})")
    return content


def _token(value: JSON, name: str, *, special: bool) -> AddedToken:
    """A token of its content, or of an object with its flags; one that is not special is searched
    for in normalised text unless it says otherwise.
    """
    said = value if isinstance(value, dict) else {}
    flags = {flag: said[flag] for flag in _FLAGS if isinstance(said.get(flag), bool)}
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
