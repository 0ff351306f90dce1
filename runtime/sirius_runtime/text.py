"""Token ids to text: incremental decoding, stop strings and streaming.

The text of a token depends on its neighbours (spaces, the bytes of one character). So a short
window of earlier tokens is decoded with each token, and text that may still change is held back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

_UNFINISHED = "�"  # the decoded text of an incomplete byte sequence
_CONTEXT = 8  # the fewest tokens of the prompt's end that are decoded with the answer
_FIRST_MARK = 0xD800  # surrogates, which no tokenizer decodes to


def read_tokenizer(content: bytes) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, without padding and truncation.

    The file may hold the padding and truncation that were set when it was saved. They would change
    prompts silently.
    """
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class IncrementalDecoder:
    """Decodes tokens that follow `prompt` one by one, without special tokens.

    Many decoders drop the first space of their input. So the prompt's end is decoded together with
    the answer, and the prompt's text plus the answer's is the text of both. A character that begins
    in the prompt and ends in the answer belongs to the answer. marks: special tokens that are kept,
    with their text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        marks: Mapping[int, str] | None = None,
    ) -> None:
        self._tokenizer, self._marks = tokenizer, marks or {}
        self._ids = _end_of(prompt, tokenizer)  # the window that is decoded together
        self._read = len(self._ids)  # ids whose text has been returned
        self._before = tokenizer.decode(self._ids)  # that text

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        if token in self._marks:
            return self._marks[token]
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        new = self._rest(text)
        if not new or text.endswith(_UNFINISHED):
            return ""
        latest = self._tokenizer.decode(self._ids[self._read :])
        if not latest.startswith(_UNFINISHED):  # else they begin within the prompt's last character
            del self._ids[: self._read]
            text = latest
        self._read, self._before = len(self._ids), text
        return new

    def flush(self) -> str:
        """The text that is still unfinished at the end, as the tokenizer decodes it."""
        text = self._tokenizer.decode(self._ids)
        new = self._rest(text)
        self._read, self._before = len(self._ids), text
        return new

    def _rest(self, text: str) -> str:
        """The part of the window's text that has not been returned yet."""
        if text.startswith(self._before):
            return text[len(self._before) :]
        if self._before.endswith(_UNFINISHED):  # the prompt's last character, finished here
            pairs = enumerate(zip(self._before, text, strict=False))
            return text[next((at for at, (a, b) in pairs if a != b), len(text)) :]
        # Bytes of an invalid character changed the text before them, as ByteFallback decoders do.
        return self._tokenizer.decode(self._ids[self._read :])


def _end_of(prompt: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The end of the prompt that the text after it may depend on. It decodes to some text, and that
    begins with a whole character.
    """
    size = _CONTEXT
    while size < len(prompt):
        end = list(prompt[-size:])
        text = tokenizer.decode(end)
        if text and not text.startswith(_UNFINISHED):
            return end
        size *= 2
    return list(prompt)


class StopStrings:
    """Stop strings, and marks for the special tokens that they name. A mark (a character that no
    text has) stands for such a token in the searched text and in `strings`. `marks`: the marks by
    token id.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str]) -> None:
        self.marks: dict[int, str] = {}
        self.strings = tuple(stop)
        self.reach = max(map(len, self.strings), default=0)
        added = tokenizer.get_added_tokens_decoder() if self.strings else {}
        self._special = {token.content: id for id, token in added.items() if token.special}
        if self._special:
            longest_first = sorted(self._special, key=len, reverse=True)
            names = re.compile("|".join(map(re.escape, longest_first)))
            self.strings = tuple(names.sub(self._mark, string) for string in self.strings)

    def shown(self, text: str) -> str:
        """`text` without its marks."""
        return text.translate({ord(mark): None for mark in self.marks.values()})

    def _mark(self, name: re.Match[str]) -> str:
        return self.marks.setdefault(self._special[name[0]], chr(_FIRST_MARK + len(self.marks)))


class StopScanner:
    """Finds stop strings in one row's tokens, also across tokens and periods."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], prompt: Sequence[int] = ()
    ) -> None:
        self._stops = StopStrings(tokenizer, stop)
        self._decoder = IncrementalDecoder(tokenizer, prompt, self._stops.marks)
        self._tail = ""

    def stops_at(self, token: int) -> bool:
        """Whether some stop string is complete with this token."""
        self._tail += self._decoder.add(token)
        found = any(s in self._tail for s in self._stops.strings)
        self._tail = self._tail[-self._stops.reach :]
        return found


def answer_text(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int], stop: Sequence[str] = ()
) -> str:
    """The text of `tokens` after `prompt` up to the first stop string, the same as a `TextStream`
    writes.

    Decoding all tokens at once may give another text where bytes form no valid character: some
    decoders then change the text before them.
    """
    stops = StopStrings(tokenizer, stop)
    decoder = IncrementalDecoder(tokenizer, prompt, stops.marks)
    text = "".join(map(decoder.add, tokens)) + decoder.flush()
    return stops.shown(cut_at_stop(text, stops.strings))


def cut_at_stop(text: str, stop: Iterable[str]) -> str:
    """`text` up to the first stop string."""
    return text[: min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))]


class TextStream:
    """A streamer with transformers' interface (`put`, `end`) that writes text as it becomes final.

    Text that may be the beginning of a stop string is held back until the next tokens. The prompt
    comes first and is not written; its end is context for decoding.
    """

    def __init__(
        self, tokenizer: Tokenizer, write: Callable[[str], None], stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._stops = StopStrings(tokenizer, stop)
        self._held = ""
        self._decoder: IncrementalDecoder | None = None  # until the prompt is known

    def put(self, value: Iterable[Any]) -> None:
        """Takes committed token ids [T]; the first call passes the prompt, [T] or [1, T]."""
        ids = _flat(value)
        if self._decoder is None:
            self._decoder = IncrementalDecoder(self._tokenizer, ids, self._stops.marks)
            return
        for token in ids:
            self._held += self._decoder.add(token)
        self._release(keep=self._possible_stop())

    def end(self) -> None:
        """Writes the text that was held back, because no more tokens follow."""
        if self._decoder is not None:
            self._held += self._decoder.flush()
        self._release(keep=0)

    def _release(self, keep: int) -> None:
        before_stop = cut_at_stop(self._held, self._stops.strings)
        stops = len(before_stop) < len(self._held)
        cut = len(before_stop) if stops else len(self._held) - keep
        if text := self._stops.shown(self._held[:cut]):
            self._write(text)
        # A stop string stays at the start of the held text, so nothing after it is ever written.
        self._held = self._held[cut:]

    def _possible_stop(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        return max(
            (
                n
                for s in self._stops.strings
                for n in range(1, len(s))
                if self._held.endswith(s[:n])
            ),
            default=0,
        )


def _flat(value: Iterable[Any]) -> list[int]:
    """The token ids of an array or list of shape [T] or [1, T], as a list."""
    ids: list[Any] = value.tolist() if hasattr(value, "tolist") else list(value)
    return [int(token) for token in (ids[0] if ids and isinstance(ids[0], list) else ids)]
