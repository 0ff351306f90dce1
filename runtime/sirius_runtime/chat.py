"""Renders chat messages to a prompt's text, by the chat template of the model's tokenizer.

Templates are rendered as transformers' `apply_chat_template` does, in a sandbox and within limits
(`template_guard`); transformers is not needed for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

from sirius_runtime.errors import ArtifactError, BackendError, GenerationError, shown
from sirius_runtime.spec import JSON, from_json

if TYPE_CHECKING:
    from jinja2 import Template

    from sirius_runtime.template_guard import ChatEnvironment

    Message = Mapping[str, Any]
    Messages = Sequence[Message] | Sequence[Sequence[Message]]

CHAT = "tokenizer/chat.json"
"""The entry of an artifact that holds a `ChatSpec`."""
DEFAULT, WITH_TOOLS = "default", "tool_use"
"""transformers' names of the template that is used by default, and of the one used with tools."""
MOST_BYTES = 2**20
"""Limit of all templates and special tokens together; well-known models have up to 30 kB."""
# Keys of a message's reasoning text; the first one that is present is read.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
NO_TEMPLATE = (
    "the model's tokenizer has no chat template; give the prompt as text, in the form that the "
    "model was trained on, or compile the model again with a chat_template.jinja in its folder"
)


@dataclass(frozen=True)
class ChatSpec:
    """An artifact's chat templates by name, and the special tokens that they may use (`bos_token`,
    …).
    """

    templates: dict[str, str]
    special_tokens: dict[str, str] = field(default_factory=dict)


class Chat:
    """The chat templates of a model."""

    def __init__(self, spec: ChatSpec) -> None:
        """Compiles no template yet: each is compiled when it is first used."""
        self.spec = spec
        self._compiled: dict[str, Template] = {}
        self._lock = Lock()  # one rendering at a time: its budget is the environment's

    @classmethod
    def read(cls, document: JSON) -> Chat | None:
        """The templates of an artifact's `ChatSpec` document; None where it has none. Raises
        ArtifactError for a document that is not a `ChatSpec` or is too large.
        """
        spec = from_json(ChatSpec, document, "chat")
        texts = [*spec.templates.values(), *spec.special_tokens.values()]
        if (size := sum(map(len, texts))) > MOST_BYTES:
            raise ArtifactError(f"chat has {size} characters, at most {MOST_BYTES} are read")
        return cls(spec) if spec.templates else None

    @property
    def names(self) -> tuple[str, ...]:
        """The templates' names."""
        return tuple(self.spec.templates)

    def render(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of one conversation, special tokens included: encode it without adding others.

        messages: mappings with `role`, and `content` in the form that the template takes. template:
        the name of a template, where there are several. tools: JSON schemas. add_generation_prompt:
        whether the text ends where an answer begins. continue_final_message: end the text within
        the last message instead, so that the answer continues it. variables: other variables of the
        template (`enable_thinking`, …).

        Raises GenerationError for invalid messages and for those that the template refuses, and
        ArtifactError for a template that can't be read, fails, or goes beyond the limits.
        """
        if continue_final_message and add_generation_prompt:
            raise GenerationError(
                "continue_final_message and add_generation_prompt exclude each other: the text "
                "ends within the last message, or where a new one begins"
            )
        given = read_messages(messages)
        if continue_final_message:
            _mark_end(given)
        text = self._render(
            self._name(template, tools is not None),
            {
                **self.spec.special_tokens,
                **_plain(variables, "chat_template_kwargs"),
                "messages": given,
                "tools": _plain(tools, "tools"),
                "documents": _plain(documents, "documents"),
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return _cut_at_mark(text) if continue_final_message else text

    def _name(self, wanted: str | None, tools: bool) -> str:
        names = self.spec.templates
        if wanted is None:
            if len(names) == 1:
                return next(iter(names))
            wanted = WITH_TOOLS if tools and WITH_TOOLS in names else DEFAULT
        if wanted not in names:
            raise GenerationError(
                f"there is no chat template {shown(wanted)}; the model has {', '.join(names)}"
            )
        return wanted

    def _render(self, name: str, variables: Mapping[str, Any]) -> str:
        environment = self._environment
        from jinja2 import TemplateError, TemplateSyntaxError

        from sirius_runtime.template_guard import Budget, TemplateLimitError

        with self._lock:
            environment.budget = Budget()
            try:
                if name not in self._compiled:
                    source = self.spec.templates[name]
                    self._compiled[name] = environment.from_string(source)
                return self._compiled[name].render(variables)
            except TemplateLimitError as error:
                raise ArtifactError(
                    f"the chat template {shown(name)} is stopped: {error}; render the messages "
                    "elsewhere, and give the text"
                ) from error
            except Exception as error:  # of any class: the template decides
                if type(error) is TemplateError:  # its own raise_exception
                    raise GenerationError(
                        f"the model's chat template refuses these messages: {error!s:.500}"
                    ) from error
                what = "can't be read" if isinstance(error, TemplateSyntaxError) else "failed"
                raise ArtifactError(
                    f"the chat template {shown(name)} {what} ({type(error).__name__}: "
                    f"{error!s:.300}); check that the messages have the form that this model takes"
                ) from error

    @cached_property
    def _environment(self) -> ChatEnvironment:
        try:
            from sirius_runtime.template_guard import ChatEnvironment
        except ImportError as error:
            raise BackendError(
                f"chat templates need jinja2 of version 3.1.6 or later ({error}); pip install -U "
                "jinja2"
            ) from error
        return ChatEnvironment()


def conversations(messages: Messages) -> list[Sequence[Message]]:
    """The batch of conversations in `messages`, which is one conversation or a batch of them."""
    if isinstance(messages, Mapping | str) or not isinstance(messages, Sequence):
        raise GenerationError(
            f"messages must be a list of mappings with role and content, got a "
            f"{type(messages).__name__}"
        )
    if not messages:
        raise GenerationError("messages is empty: give at least one")
    given: Any = messages
    batch = isinstance(messages[0], Sequence) and not isinstance(messages[0], str)
    return list(given) if batch else [given]


def read_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A copy of a conversation for templates: plain values only, without those that are None."""
    if isinstance(messages, Mapping | str) or not isinstance(messages, Sequence) or not messages:
        raise GenerationError(
            f"a conversation is a list of at least one message, got {shown(str(messages))}"
        )
    read = []
    for index, message in enumerate(messages):
        where = f"message {index}"
        if not isinstance(message, Mapping):
            raise GenerationError(
                f"{where} is a {type(message).__name__}; give a mapping with role and content, as "
                "{'role': 'user', 'content': '…'}"
            )
        fields = {
            str(key): _plain(value, f"{where}, {key}")
            for key, value in message.items()
            if value is not None
        }
        if not isinstance(fields.get("role"), str):
            raise GenerationError(
                f"{where} has no role; give system, user or assistant, as the model's template "
                "knows them"
            )
        reasoning = next((fields[key] for key in _REASONING if key in fields), None)
        if reasoning is not None:  # templates read it under either name
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        read.append(fields)
    return read


def _plain(value: Any, where: str) -> Any:
    """A copy that holds JSON values only: a template could call the methods of other objects."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, where) for item in value)
    raise GenerationError(
        f"{where} is a {type(value).__name__}; messages hold text, numbers, lists and mappings"
    )


def _mark_end(messages: list[dict[str, Any]]) -> None:
    """Appends a mark to the last message's content: the template adds text after it, and
    `_cut_at_mark` removes that text.
    """
    content = messages[-1].get("content")
    parts = content if isinstance(content, list | tuple) else ()
    part = next((p for p in reversed(parts) if isinstance(p, dict) and "text" in p), None)
    if isinstance(content, str):
        messages[-1]["content"] = content + _CONTINUED
    elif part is not None:
        part["text"] += _CONTINUED
    else:
        raise GenerationError("the last message has no content to continue: give it some text")


def _cut_at_mark(text: str) -> str:
    place = text.rfind(_CONTINUED.strip())
    if place < 0:
        raise GenerationError(
            "the chat template leaves out the end of the last message, so that it can't be "
            "continued; give the text itself"
        )
    whole = text.startswith(_CONTINUED, place)
    return text[:place] if whole else text[:place].rstrip()  # the template strips contents
