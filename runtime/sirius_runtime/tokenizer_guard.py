"""Guards against an untrusted `tokenizer.json`: checks before the tokenizers library reads it, and
errors for the library's own failures.

The library is compiled code that can't be interrupted, so anything that could keep it busy forever
is refused: patterns that are too long to compile cheaply; patterns that repeat a repetition or an
alternative, whose search may take unbounded time; and everything that makes a text or its tokens
much longer (replacements, character maps, templates, long words). The guard is partial: patterns
that take time quadratic in the text are allowed, because well-known tokenizers have such patterns.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sirius_runtime import plain_json
from sirius_runtime.errors import ArtifactError
from sirius_runtime.spec import JSON

MOST_BYTES = 128 * 2**20
"""Most bytes of a tokenizer.json; one of a quarter million tokens has 35 MiB."""
MOST_VALUES = 8 * 2**20
"""Most JSON values; the words and merges of a quarter million tokens are two million."""
LONGEST_PATTERN = 4096
"""Most characters of all patterns together: compiled, each Unicode class takes 15 kB."""
MOST_REPEATED = 64
"""The largest count of a counted repetition."""
MOST_GROWTH = 64
"""The factor by which all replacements together may lengthen a text."""
MOST_ADDED = 256
"""Most tokens that all templates together may add to a text: the library ends the process if it
runs out of memory.
"""
LONGEST_WORD = 8192
"""Most characters of a token's text; well-known tokenizers have a few hundred."""


def check_tokenizer(content: bytes) -> None:
    """Raises ArtifactError, with the reason, for a tokenizer.json that must not be read."""
    if len(content) > MOST_BYTES:
        raise ArtifactError(f"it has {len(content)} bytes, at most {MOST_BYTES} are read")
    try:
        document = plain_json.read(content, MOST_VALUES)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"it is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise ArtifactError("it is not an object")
    _check_words(document)
    _check_templates(document.get("post_processor"))
    growth, length = 1.0, 0
    for name, part in document.items():
        if name == "model":
            continue  # words are not patterns
        for rule in _objects(part):
            pattern = rule.get("pattern")
            text = _text_of(pattern)
            if isinstance(pattern, dict) and "Regex" in pattern:
                length += len(text)
                if length > LONGEST_PATTERN:
                    raise ArtifactError(
                        f"its patterns have more than {LONGEST_PATTERN} characters together"
                    )
                if reason := fault_of(text):
                    raise ArtifactError(f"its pattern {text!r:.80} {reason}")
                text = "x"  # a pattern matches at least one character
            for written in ("content", "replacement", "prepend"):
                value = rule.get(written)
                if isinstance(value, str) and (pattern is not None or written != "content"):
                    growth *= max(1.0, len(value) / max(len(text), 1))
            if "precompiled_charsmap" in rule:
                growth *= max(1.0, _longest_of_map(rule["precompiled_charsmap"]))
    if growth > MOST_GROWTH:
        raise ArtifactError(
            f"its replacements lengthen a text up to {growth:.0f} times, at most {MOST_GROWTH} "
            "are allowed"
        )


def _check_words(document: dict[str, JSON]) -> None:
    """Checks the lengths of tokens' texts: a model may generate the longest one many times."""
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    words: list[JSON] = []
    if isinstance(vocabulary, dict):
        words += vocabulary
    elif isinstance(vocabulary, list):  # pairs of a word and its score
        words += [pair[0] for pair in vocabulary if isinstance(pair, list) and pair]
    rest = {name: part for name, part in document.items() if name != "model"}
    own = model if isinstance(model, dict) else {}
    rest["model"] = {name: part for name, part in own.items() if isinstance(part, str)}
    for rule in _objects(rest):
        words += [v for k, v in rule.items() if k not in ("precompiled_charsmap", "Regex")]
    longest = max((len(word) for word in words if isinstance(word, str)), default=0)
    if longest > LONGEST_WORD:
        raise ArtifactError(
            f"it has a text of {longest} characters, at most {LONGEST_WORD} are allowed"
        )


def _check_templates(processor: JSON) -> None:
    added = 0
    for rule in _objects(processor):
        special = rule.get("special_tokens")
        if not isinstance(special, dict):
            continue
        sizes = {
            name: max(len(token.get(k) or ()) for k in ("ids", "tokens"))
            for name, token in special.items()
            if isinstance(token, dict)
            and all(isinstance(token.get(k), list | None) for k in ("ids", "tokens"))
        }
        for side in ("single", "pair"):
            pieces = [one.get("SpecialToken") for one in _objects(rule.get(side))]
            names = [piece.get("id") for piece in pieces if isinstance(piece, dict)]
            added += sum(sizes.get(name, 1) for name in names if isinstance(name, str))
            if isinstance(written := rule.get(side), str | list):  # "$A </s>", or a list of such
                words = written.split() if isinstance(written, str) else written
                named = [word.partition(":")[0] for word in words if isinstance(word, str)]
                added += sum(sizes.get(name, 0) for name in named)
    if added > MOST_ADDED:
        raise ArtifactError(
            f"its templates add {added} tokens to a text, at most {MOST_ADDED} are allowed"
        )


def _longest_of_map(written: JSON) -> int:
    """The longest replacement of one character in a SentencePiece character map.

    The map is: the size of a trie (four bytes little-endian), the trie, and texts that end in a
    zero byte.
    """
    if not isinstance(written, str):
        return 0
    try:
        data = base64.b64decode(written, validate=True)
    except ValueError:
        return 0  # the library refuses it
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max((len(text.decode(errors="replace")) for text in texts.split(b"\0")), default=0)


def _text_of(pattern: JSON) -> str:
    if isinstance(pattern, dict):
        for kind in ("Regex", "String"):
            if isinstance(pattern.get(kind), str):
                return str(pattern[kind])
    return pattern if isinstance(pattern, str) else ""


def _objects(value: JSON) -> Iterator[dict[str, Any]]:
    """Every object within a value, at any depth."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield one
            left.extend(one.values())
        elif isinstance(one, list):
            left.extend(one)


def fault_of(pattern: str) -> str | None:
    """Why the search for a pattern may take unbounded time; None where no reason is found."""
    # For each open group: whether it holds an alternative or a repetition.
    varies = [False]
    # ended: whether a group or repetition ends just before `place`; last_varies: whether it varies.
    place, ended = 0, False
    last_varies = False
    while place < len(pattern):
        character = pattern[place]
        if character == "\\":
            follows = pattern[place + 1 : place + 2]
            if follows in ("g", "k") or (follows.isdigit() and follows != "0"):
                return "has a back-reference or a call of a group"
            place, ended, last_varies = place + 2, False, False
            if follows in "pPuxoO" and pattern[place : place + 1] == "{":
                close = pattern.find("}", place)  # the name of a class, not a repetition
                place = len(pattern) if close < 0 else close + 1
        elif character == "[":
            place, ended, last_varies = _after_class(pattern, place), False, False
        elif character == "(":
            varies.append(False)
            place, ended = place + 1, False
            if pattern[place : place + 1] == "?":
                place += 1  # begins the group's kind; not a repetition
        elif character == ")":
            inner = varies.pop() if len(varies) > 1 else False
            varies[-1] |= inner
            place, ended, last_varies = place + 1, True, inner
        elif character == "|":
            varies[-1] = True
            place, ended, last_varies = place + 1, False, False
        elif character in "*+?{":
            least, most, after = _repetition(pattern, place)
            if after == place:  # a brace without a count is a literal
                place, ended, last_varies = place + 1, False, False
                continue
            if ended and last_varies and most > 1:
                return "repeats a group that holds a repetition or an alternative"
            if most > MOST_REPEATED and most != _WITHOUT_END:
                return f"repeats more than {MOST_REPEATED} times"
            counted = least == most <= _FEW  # such as \p{N}{3}
            varies[-1] |= not counted
            place, last_varies = after, last_varies or not counted
            ended = ended or most > 1  # a repetition of it would be nested
        else:
            place, ended, last_varies = place + 1, False, False
    return None


_WITHOUT_END = 2**31
_FEW = 8
_COUNTED = re.compile(r"\{(?=[\d,]*\d)(\d{0,9})(,?)(\d{0,9})\}")


def _repetition(pattern: str, place: int) -> tuple[int, int, int]:
    """The least and the most counts of the repetition at `place`, and the place after it; that is
    `place` for a brace without a count.
    """
    character, after = pattern[place], place + 1
    least, most = {"?": (0, 1), "*": (0, _WITHOUT_END), "+": (1, _WITHOUT_END)}.get(
        character, (0, 0)
    )
    if character == "{":
        found = _COUNTED.match(pattern, place)
        if found is None:
            return 0, 0, place
        few, comma, many = found.groups()
        least, after = int(few or 0), found.end()
        most = int(many) if many else _WITHOUT_END if comma else least
    marks = "?" if character == "{" else "?+"  # lazy or possessive
    if pattern[after : after + 1] in tuple(marks):
        after += 1
    return least, most, after


def _after_class(pattern: str, place: int) -> int:
    """The place after the character class that starts at `place`; classes may be nested."""
    depth = 0
    while place < len(pattern):
        character = pattern[place]
        if character == "\\":
            place += 2
            continue
        depth += (character == "[") - (character == "]")
        place += 1
        if not depth:
            break
        if character == "[" and pattern[place : place + 1] == "^":
            place += 1
        if character == "[" and pattern[place : place + 1] == "]":
            place += 1  # a bracket at the start of a class is a literal
    return place


@contextmanager
def guarded() -> Iterator[None]:
    """Turns errors of the tokenizers library into an ArtifactError: panics, which are not
    `Exception`s, and errors, which are of the class `Exception` itself.
    """
    try:
        yield
    except BaseException as error:
        if not is_panic(error) and type(error) is not Exception:
            raise
        reason = next(iter(str(error).splitlines()), "")
        raise ArtifactError(
            f"the artifact's tokenizer failed ({reason:.200}); compile the model again, with the "
            "tokenizer that belongs to it"
        ) from error


@contextmanager
def panics_caught() -> Iterator[None]:
    """As `guarded`, but only for panics: for contexts that also run a caller's code."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        with guarded():
            raise


def is_panic(error: BaseException) -> bool:
    """Whether an exception is a Rust panic; its class can't be imported."""
    return type(error).__name__ == "PanicException"
