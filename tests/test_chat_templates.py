"""Chat templates give the text that transformers' apply_chat_template gives, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sirius_compile.models import ModelSource
from sirius_compile.tokenizer import tokenizer_files
from sirius_runtime.chat import MOST_BYTES, Chat, ChatSpec, conversations
from sirius_runtime.errors import ArtifactError, GenerationError, UnsupportedModelError
from sirius_runtime.spec import to_json
from tests.support.models import word_tokenizer
from tests.support.templates import CHATML, FAMILIES, GEMMA, LLAMA_2, LLAMA_3, MACROS

SPECIAL = {"bos_token": "<s>", "eos_token": "</s2>", "unk_token": "<pad>"}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


SYSTEM = {"role": "system", "content": " Be brief. "}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"a": {"type": "integer", "text": "<é> & 'x'"}}},
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [user("How much is 2 < 3 & é?")],
    "system": [SYSTEM, user("\n a\t")],
    "turns": [user("a"), assistant(" b "), user("c"), assistant("<think>d</think>\n\ne"), user("")],
    "parts": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "<b>"}])],
    "reasoning": [user("a"), assistant("b", reasoning="why"), user("{{ c }}")],
    "tools": [user("a"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "3"}],
    "ends with an answer": [SYSTEM, user("a"), assistant("The answer is ")],
}


def tokenizer_with(template: str | dict[str, str]) -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    for name, token in SPECIAL.items():
        setattr(tokenizer, name, token)
    tokenizer.chat_template = template
    return tokenizer


def chat_of(tokenizer: PreTrainedTokenizerFast | ModelSource) -> Chat:
    chat = Chat.read(json.loads(tokenizer_files(tokenizer)["chat.json"]))
    assert chat is not None
    return chat


def outcome(render: Any) -> str:
    """The rendered text, or a marker for a refusal."""
    try:
        return str(render())
    except Exception as error:
        return f"refused: {error}"


def same(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """Renders by both, which must agree; a refusal must be for the same reason."""
    options.setdefault("add_generation_prompt", True)
    tokenizer = tokenizer_with(template)
    theirs = outcome(
        lambda: tokenizer.apply_chat_template(messages, tokenize=False, **options),
    )
    ours = outcome(lambda: chat_of(tokenizer).render(messages, **options))
    if theirs.startswith("refused: "):
        assert ours.startswith("refused: ")
        if "continue_final_message" not in theirs:  # which each says in its own words
            assert theirs.removeprefix("refused: ") in ours
    else:
        assert ours == theirs
    return ours


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_render_as_by_transformers(family: str, chat: str) -> None:
    template, messages = FAMILIES[family], CHATS[chat]
    same(template, messages)
    same(template, messages, add_generation_prompt=False)
    same(template, messages, tools=[TOOL], enable_thinking=False)
    same(template, messages, documents=[{"title": "a", "text": "b"}], eos_token="<other>")
    if messages[-1].get("content"):
        same(template, messages, add_generation_prompt=False, continue_final_message=True)


def test_the_families_do_what_they_are_here_for() -> None:
    """Not only refusals are compared."""
    assert same(CHATML, CHATS["system"]).endswith("<|im_start|>assistant\n")
    assert same(LLAMA_2, CHATS["one"]).startswith("<s>[INST] How much")
    assert "<|eot_id|>" in same(LLAMA_3, CHATS["parts"])
    assert "System role not supported" in same(GEMMA, CHATS["system"])
    assert "why</s2>" in same(MACROS, CHATS["reasoning"])
    assert '"name": "add"' in same(CHATML, CHATS["tools"])


# What of a template's language decides the text: white space, blocks, filters, undefined names.
PIECES = st.sampled_from(
    """{% if add_generation_prompt %}
|{% endif %}
|{%- for m in messages %}
|  {% for m in messages %}
|{% endfor %}
|    {{ m.content }}
|{{- m['role'] | upper -}}
|{{ missing }}|{{ m.none.content }}|{{ messages | length }}|{# note #}
|{{ bos_token ~ 1 ~ none ~ [1, 'a'] }}|{{ 'a\\n' * 3 }}|{{ '%5s|%d' % ('a', 7) }}
|{{ (messages | first).content | indent(2, true) }}|{{ [3, 1, 2] | sort | join(', ') }}
|{% set x = 'b' %}|{{ x | default('none') }}|{{ loop.index if loop is defined }}
|{{ messages[0].content[::-1] | trim | replace('a', 'xyz') | title }}|{{ 7 // 2 + 2 ** 3 % 5 }}
|{{ {'b': 1, 'a': (1, 2)} | tojson(indent=2, sort_keys=true) }}|{{ "é<'" | e }}
|{{ range(3) | list }}
|{% filter upper %}
|{% endfilter %}
|{{ messages | map(attribute='role') | unique | list }}|{{ 'abc'.center(9).split('b') }}
|{{ namespace(a=1).a }}|{{ "{:>4}".format('x') }}|{{ 3.14159 | round(2) }}|text
""".split("|")
)


@given(st.lists(PIECES, max_size=8), st.sampled_from(sorted(CHATS)))
def test_random_templates_render_as_by_transformers(pieces: list[str], chat: str) -> None:
    template, messages = "".join(pieces), CHATS[chat]
    if not template:
        return
    tokenizer = tokenizer_with(template)
    chats = Chat(ChatSpec({"default": template}, SPECIAL | {"pad_token": "<pad>"}))
    theirs = outcome(lambda: tokenizer.apply_chat_template(messages, tokenize=False))
    ours = outcome(lambda: chats.render(messages, add_generation_prompt=False))
    refused = theirs.startswith("refused: ")
    assert ours.startswith("refused: ") if refused else ours == theirs


# ---------------------------------------------------------------- where a tokenizer keeps them


def folder_of(tmp_path: Path, config: dict[str, Any], files: dict[str, str]) -> ModelSource:
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    base = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(base | SPECIAL | config))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return ModelSource(tmp_path, "model", None, False)


A, B = "A {{ bos_token }}", "B {{ eos_token }}"
PLACES: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"chat_template": A}, {}),
    ({}, {"chat_template.jinja": A}),
    ({"chat_template": B}, {"chat_template.jinja": A}),
    ({"chat_template": [{"name": "default", "template": A}, {"name": "rag", "template": B}]}, {}),
    ({}, {"chat_template.jinja": A, "additional_chat_templates/rag.jinja": B}),
    ({"chat_template": A, "bos_token": {"content": "<s>", "__type": "AddedToken"}}, {}),
    ({"chat_template": A}, {"special_tokens_map.json": json.dumps({"bos_token": "</s5>"})}),
]


@pytest.mark.parametrize(("config", "files"), PLACES)
def test_templates_are_found_where_transformers_finds_them(
    tmp_path: Path, config: dict[str, Any], files: dict[str, str]
) -> None:
    source = folder_of(tmp_path, config, files)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), chat_of(source)
    assert ours.spec.special_tokens == theirs.special_tokens_map
    names = theirs.chat_template if isinstance(theirs.chat_template, dict) else {"default": A}
    assert ours.spec.templates == names
    for name in names:
        by_name = name if len(names) > 1 else None
        text = theirs.apply_chat_template(CHATS["one"], chat_template=by_name, tokenize=False)
        assert ours.render(CHATS["one"], template=name) == text
    again = chat_of(theirs)  # of a tokenizer in memory
    assert again.spec == ours.spec


def test_the_template_of_a_processor_serves_where_there_is_no_other(tmp_path: Path) -> None:
    source = folder_of(tmp_path, {}, {"chat_template.json": json.dumps({"chat_template": A})})
    assert chat_of(source).spec.templates == {"default": A}


def test_a_tokenizer_without_a_template_has_no_file_of_them(tmp_path: Path) -> None:
    assert "chat.json" not in tokenizer_files(folder_of(tmp_path, {}, {}))
    assert "chat.json" not in tokenizer_files(word_tokenizer())


@pytest.mark.parametrize("wrong", [7, {"default": 7}, {"default": "x" * (MOST_BYTES + 1)}])
def test_templates_that_are_none_are_refused_when_compiling(tmp_path: Path, wrong: Any) -> None:
    source = folder_of(tmp_path, {"chat_template": wrong}, {})
    with pytest.raises(UnsupportedModelError, match=r"chat templates can't be used.*fix"):
        tokenizer_files(source)


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path, {}, {})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UnsupportedModelError, match=r"chat_template\.jinja can't be read"):
        tokenizer_files(source)


# ---------------------------------------------------------------- several, and wrong ones


NAMED = Chat(ChatSpec({"default": "d", "tool_use": "t", "rag": "r"}))


def test_the_template_is_chosen_as_transformers_does() -> None:
    one = CHATS["one"]
    assert NAMED.names == ("default", "tool_use", "rag")
    assert (NAMED.render(one), NAMED.render(one, tools=[TOOL])) == ("d", "t")
    assert NAMED.render(one, template="rag", tools=[TOOL]) == "r"
    with pytest.raises(GenerationError, match="no chat template 'x'; the model has default, tool"):
        NAMED.render(one, template="x")
    with pytest.raises(GenerationError, match="no chat template 'default'; the model has a, b"):
        Chat(ChatSpec({"a": "", "b": ""})).render(one)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ("hello", "list of at least one message, got 'hello'"),
        ({"role": "user", "content": "a"}, "list of at least one"),
        (["hello"], "message 0 is a str; give a mapping with role and content"),
        ([user("a"), {"content": "b"}], "message 1 has no role"),
        ([{"role": None, "content": "b"}], "message 0 has no role"),
        ([user(object())], "message 0, content is a object"),
        ([user([{"image": b"x"}])], "message 0, content is a bytes"),
    ],
)
def test_messages_that_are_none_are_named(messages: Any, words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        NAMED.render(messages)


def test_one_conversation_or_several() -> None:
    one: Any = CHATS["one"]
    assert conversations(one) == [one]
    assert conversations([one, tuple(one)]) == [one, tuple(one)]
    for wrong in ("text", {"role": "user"}, 7, []):
        with pytest.raises(GenerationError, match="messages"):
            conversations(wrong)  # type: ignore[arg-type]


def test_the_end_of_an_answer_can_be_continued_only_where_there_is_one() -> None:
    with pytest.raises(GenerationError, match="exclude each other"):
        NAMED.render(CHATS["one"], continue_final_message=True)
    options = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(GenerationError, match="no content to continue"):
        NAMED.render([user(None)], **options)
    with pytest.raises(GenerationError, match="leaves out the end of the last message"):
        NAMED.render(CHATS["one"], **options)


def test_a_document_that_is_no_chat_is_refused() -> None:
    assert Chat.read(to_json(ChatSpec({}))) is None
    for wrong in ([], {}, {"templates": {}}, {"templates": {"a": 1}, "special_tokens": {}}):
        with pytest.raises(ArtifactError):
            Chat.read(wrong)
    with pytest.raises(ArtifactError, match=f"at most {MOST_BYTES}"):
        Chat.read({"templates": {"a": "x" * MOST_BYTES, "b": "y"}, "special_tokens": {}})


def test_templates_that_fail_say_which_and_why() -> None:
    for source, words in (
        ("{% for %}", "'a' can't be read"),
        ("{{ messages + 1 }}", "'a' failed"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'x' %}", "'a' failed"),
        ("{{ 'x' | nothing }}", "No filter named 'nothing'"),
    ):
        with pytest.raises(ArtifactError, match=words):
            Chat(ChatSpec({"a": source})).render(CHATS["one"])
