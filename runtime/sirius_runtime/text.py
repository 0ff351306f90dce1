"""Token ids to text, as they come: incremental decoding, stop strings, and what may be shown.

Decoding a token alone loses what its neighbours decide (spaces, bytes of one character), so a short
window of earlier tokens is decoded with it, and text that may still change is held back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

_UNFINISHED = "�"  # what an incomplete byte sequence decodes to
_CONTEXT = 8  # tokens of a prompt's end that are decoded with the answer, at the least
_FIRST_MARK = 0xD800  # surrogates: no tokenizer decodes to one


def read_tokenizer(content: bytes) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, made to encode a text as it is.

    The file carries the padding and truncation that were set when it was saved: they belong to
    batches of that time, and would change prompts in silence.
    """
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class IncrementalDecoder:
    """Text of the growing list of token ids that follows `prompt`, special tokens left out.

    Many decoders drop the first space of their input. So the prompt's end is decoded with the
    answer, and the prompt's text joined with the answer's is the text of both. A character that the
    prompt leaves unfinished belongs to the answer. marks: the text of special tokens that are to be
    kept.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        marks: Mapping[int, str] | None = None,
    ) -> None:
        self._tokenizer, self._marks = tokenizer, marks or {}
        self._ids = _end_of(prompt, tokenizer)  # the window that is decoded together
        self._read = len(self._ids)  # the text of ids before it is out
        self._before = tokenizer.decode(self._ids)  # which is this

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
        """What is still unfinished at the end, as it decodes."""
        text = self._tokenizer.decode(self._ids)
        new = self._rest(text)
        self._read, self._before = len(self._ids), text
        return new

    def _rest(self, text: str) -> str:
        """What of the window's text is not out yet."""
        if text.startswith(self._before):
            return text[len(self._before) :]
        if self._before.endswith(_UNFINISHED):  # the prompt's last character, finished here
            pairs = enumerate(zip(self._before, text, strict=False))
            return text[next((at for at, (a, b) in pairs if a != b), len(text)) :]
        # Bytes that make no character changed the text before them (ByteFallback does that).
        return self._tokenizer.decode(self._ids[self._read :])


def _end_of(prompt: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """As much of the prompt's end as the text after it depends on: it has text, and begins with a
    whole character.
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
    """Stop strings as they are searched for, in a text where the special tokens that they name
    stand as marks: `marks` by token id.
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
    """Watches one row's tokens for stop strings, wherever they straddle tokens or periods."""

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
    """The text of `tokens` after `prompt` up to the first stop string, as a stream of them shows
    it.

    Decoding them at once would differ where bytes never make a character: some decoders then take
    back what came before.
    """
    stops = StopStrings(tokenizer, stop)
    decoder = IncrementalDecoder(tokenizer, prompt, stops.marks)
    text = "".join(map(decoder.add, tokens)) + decoder.flush()
    return stops.shown(cut_at_stop(text, stops.strings))


def cut_at_stop(text: str, stop: Iterable[str]) -> str:
    """`text` up to the first stop string."""
    return text[: min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))]


class TextStream:
    """A streamer in transformers' manner (`put`, `end`) that hands out text which is never taken
    back.

    Text that might be the beginning of a stop string is held until the next tokens decide. The
    prompt, which comes first, is not written; its end is the context of what follows.
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
        """Takes committed token ids [T]; the first call brings the prompt, [T] or [1, T]."""
        ids = _flat(value)
        if self._decoder is None:
            self._decoder = IncrementalDecoder(self._tokenizer, ids, self._stops.marks)
            return
        for token in ids:
            self._held += self._decoder.add(token)
        self._release(keep=self._possible_stop())

    def end(self) -> None:
        """Writes what was held back: no stop string can come any more."""
        if self._decoder is not None:
            self._held += self._decoder.flush()
        self._release(keep=0)

    def _release(self, keep: int) -> None:
        before_stop = cut_at_stop(self._held, self._stops.strings)
        stops = len(before_stop) < len(self._held)
        cut = len(before_stop) if stops else len(self._held) - keep
        if text := self._stops.shown(self._held[:cut]):
            self._write(text)
        # A stop string stays at the head of what is held, so nothing after it is ever written.
        self._held = self._held[cut:]

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
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
    """Token ids of shape [T] or [1, T], of any kind of array."""
    ids: list[Any] = value.tolist() if hasattr(value, "tolist") else list(value)
    return [int(token) for token in (ids[0] if ids and isinstance(ids[0], list) else ids)]
