"""A conversation with a model: its messages, and the next answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sirius_runtime.chat import NO_TEMPLATE, Chat
from sirius_runtime.errors import GenerationError
from sirius_runtime.model import GenerationOutput, SiriusModel
from sirius_runtime.text import TextStream
from sirius_runtime.tokenizer_guard import guarded

DEFAULT_ANSWER = 1024
"""Default limit of an answer's tokens."""


@dataclass(frozen=True)
class Answer:
    """An answer: its text, as it is in the conversation. `output`: None if Ctrl-C stopped it.
    `full`: whether the answer ended because the model's sequence length was reached.
    """

    text: str
    output: GenerationOutput | None
    full: bool = False


class Conversation:
    """Messages in their order. Each answer is generated from all of them, by the model's own chat
    template.
    """

    def __init__(
        self,
        model: SiriusModel,
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> None:
        """max_new_tokens: limit of an answer; the model's sequence length may leave fewer. options:
        for `SiriusModel.generate`. Raises GenerationError for a model without a chat template.
        """
        if model.chat is None or model.tokenizer is None:
            raise GenerationError(NO_TEMPLATE)
        self._model, self._options = model, options
        self._chat: Chat = model.chat
        self._tokenizer = model.tokenizer
        self._template = chat_template
        self._most = DEFAULT_ANSWER if max_new_tokens is None else max_new_tokens
        self.system = system
        self.turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, the system's first."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.turns

    def reset(self, system: str | None = None) -> None:
        """Forgets all messages; `system` becomes the system message."""
        self.system = system
        self.turns = []

    def ask(self, text: str, write: Callable[[str], None] = lambda text: None) -> Answer:
        """Generates the answer to `text`; passes its text to `write` as it is generated.

        KeyboardInterrupt stops the answer: it is then the text written so far. Raises
        GenerationError where no answer can be generated; the conversation is then as it was before.
        """
        asked = {"role": "user", "content": text}
        ids = self._encode([*self.messages, asked])
        room = self._length - len(ids)
        if room < 1:
            raise GenerationError(
                f"the conversation has {len(ids)} tokens, and the model serves {self._length}; "
                "start over (/reset), or compile with a larger --max-seq-len where the model's "
                "positions allow it"
            )
        written: list[str] = []

        def both(part: str) -> None:
            written.append(part)
            write(part)

        output = None
        stream = TextStream(self._tokenizer, both, self._options.get("stop") or ())
        most = min(self._most, room)
        with contextlib.suppress(KeyboardInterrupt):
            output = self._model.generate(
                ids, streamer=stream, max_new_tokens=most, **self._options
            )
        answer = "".join(written)
        self.turns += [asked, {"role": "assistant", "content": answer}]
        full = output is not None and most == room and len(output.tokens[0]) == room
        return Answer(answer, output, full)

    @property
    def _length(self) -> int:
        limits = self._model.backend.limits
        longest = self._model.program.model.max_seq_len
        return longest if limits is None else min(longest, limits.context or longest)

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        text = self._chat.render(messages, template=self._template)
        with guarded():
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
