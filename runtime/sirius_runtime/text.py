"""Token ids to text, as they come: incremental decoding, stop strings, and what may be shown.

Decoding a token alone loses what its neighbours decide (spaces, bytes of one character), so a short
window of earlier tokens is decoded with it, and text that may still change is held back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tokenizers import Tokenizer

_UNFINISHED = "�"  # what an incomplete byte sequence decodes to


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
    """Text of a growing list of token ids, special tokens left out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # of the window that is decoded together
        self._read = 0  # ids before it have their text out

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        text = self._tokenizer.decode(self._ids[self._start :])
        if len(text) <= len(before) or text.endswith(_UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """What is still unfinished at the end, as it decodes."""
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        self._read = len(self._ids)
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """The text of `tokens` as a stream of them shows it.

    Decoding them at once would differ where bytes never make a character: some decoders then take
    back what came before.
    """
    decoder = IncrementalDecoder(tokenizer)
    return "".join(map(decoder.add, tokens)) + decoder.flush()


class StopScanner:
    """Watches one row's tokens for stop strings, wherever they straddle tokens or periods."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._stop = tuple(stop)
        self._reach = max((len(s) for s in stop), default=0)
        self._tail = ""

    def stops_at(self, token: int) -> bool:
        """Whether some stop string is complete with this token."""
        self._tail += self._decoder.add(token)
        found = any(s in self._tail for s in self._stop)
        self._tail = self._tail[-self._reach :]
        return found


def cut_at_stop(text: str, stop: Iterable[str]) -> str:
    """`text` up to the first stop string."""
    return text[: min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))]


class TextStream:
    """A streamer in transformers' manner (`put`, `end`) that hands out text which is never taken
    back.

    Text that might be the beginning of a stop string is held until the next tokens decide. The
    prompt, which comes first, is skipped.
    """

    def __init__(
        self, tokenizer: Tokenizer, write: Callable[[str], None], stop: Sequence[str] = ()
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._write = write
        self._stop = tuple(stop)
        self._held = ""
        self._prompt_seen = False

    def put(self, value: Iterable[int]) -> None:
        """Takes committed token ids; the first call brings the prompt."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value:
            self._held += self._decoder.add(int(token))
        self._release(keep=self._possible_stop())

    def end(self) -> None:
        """Writes what was held back: no stop string can come any more."""
        self._held += self._decoder.flush()
        self._release(keep=0)

    def _release(self, keep: int) -> None:
        before_stop = cut_at_stop(self._held, self._stop)
        stops = len(before_stop) < len(self._held)
        cut = len(before_stop) if stops else len(self._held) - keep
        if cut:
            self._write(self._held[:cut])
        # A stop string stays at the head of what is held, so nothing after it is ever written.
        self._held = self._held[cut:]

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max(
            (n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])),
            default=0,
        )
