"""What `generate` reads as prompts: every form of ids and text, and what it refuses, by name."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import UserDict, UserList, deque
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors

from sirius_runtime.errors import GenerationError
from sirius_runtime.model import SiriusModel
from sirius_runtime.prompts import PromptReader, PromptWarning, read_ids
from tests.support.models import VOCABULARY, TinyModels, word_tokenizer

ROWS = [[7, 8], [7, 8, 9]]
PADDED, MASK = [[0, 7, 8], [7, 8, 9]], [[0, 1, 1], [1, 1, 1]]
TEXT = "w7 w8 w9"


def reader(*, bos: bool = False) -> PromptReader:
    """Of the word tokenizer, which puts BOS before a text where `bos`."""
    tokenizer = word_tokenizer().backend_tokenizer
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PromptReader(tokenizer, VOCABULARY)


READER = reader()


@pytest.mark.parametrize(
    "ids",
    [
        [7, 8, 9],
        (7, 8, 9),
        range(7, 10),
        deque([7, 8, 9]),
        UserList([7, 8, 9]),
        np.array([7, 8, 9]),
        np.array([7, 8, 9], np.uint8),
        list(np.array([7, 8, 9])),
        [np.int32(7), 8, np.uint16(9)],
        torch.tensor([7, 8, 9]),
        torch.tensor([7, 8, 9], dtype=torch.int16),
        list(torch.tensor([7, 8, 9])),
        [[7, 8, 9]],
        [np.array([7, 8, 9])],
        [list(np.array([7, 8, 9]))],
        [torch.tensor([7, 8, 9])],
        np.array([[7, 8, 9]]),
        torch.tensor([[7, 8, 9]]),
    ],
    ids=lambda ids: f"{type(ids).__name__} {ids}"[:40],
)
def test_ids_of_every_kind(ids: Any) -> None:
    for found in (
        READER.read(ids),
        READER.read(None, ids),
        READER.read({"input_ids": ids}),
        READER.read(None, ids, np.ones(3)),
        READER.read(ids, attention_mask=[[1, 1, 1]]),
    ):
        assert found == [[7, 8, 9]]
        assert all(type(token) is int for token in found[0])


def test_text_and_batches_of_either() -> None:
    assert READER.read(TEXT) == [[7, 8, 9]]
    assert READER.read([TEXT, "w6"]) == [[7, 8, 9], [6]]
    assert READER.read([TEXT, [6], torch.tensor([5])]) == [[7, 8, 9], [6], [5]]


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_masks_leave_padding_out(make: Any) -> None:
    ids, mask = make(PADDED), make(MASK)
    assert READER.read(ids, attention_mask=mask) == ROWS
    assert READER.read(None, ids, mask) == ROWS
    assert READER.read({"input_ids": ids}, attention_mask=mask) == ROWS
    tokenized = {"input_ids": ids, "attention_mask": mask, "token_type_ids": make(MASK)}
    assert READER.read(tokenized) == READER.read(UserDict(tokenized)) == ROWS
    assert READER.read(make([7, 8, 0]), attention_mask=make([1, 1, 0])) == [[7, 8]]
    assert READER.read(ROWS, attention_mask=[[1, 1], [1.0, True, 1]]) == ROWS


@pytest.mark.parametrize("kind", ["np", "pt", None])
def test_what_a_tokenizer_of_transformers_returns(tiny: TinyModels, kind: str | None) -> None:
    """Its keys were once taken as the prompts."""
    model, tokenizer = tiny(method="griffin").model, word_tokenizer()
    encoded = tokenizer(["w7 w8", TEXT], padding=True, padding_side="left", return_tensors=kind)
    wanted = model.generate(ROWS, max_new_tokens=5)
    for output in (
        model.generate(encoded, max_new_tokens=5),
        model.generate(**{"token_type_ids": [[0]], **encoded}, max_new_tokens=5),
        model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=5,
        ),
    ):
        assert output.prompts == ((7, 8), (7, 8, 9))
        assert (output.tokens, output.texts) == (wanted.tokens, wanted.texts)
    one = model.generate(tokenizer(TEXT), max_new_tokens=5)
    assert one.prompts == ((7, 8, 9),)


def test_a_rendered_chat(tiny: TinyModels) -> None:
    model, tokenizer = tiny(method="griffin").model, word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    messages = [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}]
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(rendered, max_new_tokens=1).prompts == ((7, 8, 9),)
    with pytest.raises(GenerationError) as refused:
        model.generate(messages)
    assert "chat messages are not a prompt: give them as generate(messages=" in str(refused.value)
    assert "tokenizer.apply_chat_template(messages, add_generation_prompt=True" in str(
        refused.value
    )


MESSAGE = {"role": "user", "content": "w7"}
CHAT = "chat messages are not a prompt: give them as generate"
HERE = "instead of token ids"
REFUSED: list[tuple[Any, str]] = [
    (None, "no prompt was given: give text, token ids, or a batch of them"),
    ([], "no prompt was given"),
    ({"input_ids": None}, "no prompt was given"),
    (np.zeros((0, 3), int), "no prompt was given"),
    ("", "prompt 0 is empty"),
    ([[]], "prompt 0 is empty"),
    ([[7], []], "prompt 1 is empty"),
    (["w7", ""], "prompt 1 is empty"),
    (np.array([]), "prompt 0 is empty"),
    # text where ids belong
    ([7, "w8"], f"prompt 0 has text ('w8') {HERE}"),
    ([[7], ["w8", "w9"]], f"prompt 1 has text ('w8') {HERE}"),
    ({"input_ids": "w7"}, "text is given as token ids: input_ids and attention_mask are"),
    ({"input_ids": ["w7", "w8"]}, "text is given as token ids"),
    (np.array(["w7"]), "input_ids must be integers of shape [B, T] or [T], got <U2 [1]"),
    (b"w7", "the prompt is of type bytes; give text, a list of token ids"),
    ([b"w7"], "prompt 0 is of type bytes"),
    # other numbers
    ([7.0, 8.0], f"prompt 0 has a float (7.0) {HERE}"),
    ([[7], [8, 9.5]], f"prompt 1 has a float (9.5) {HERE}"),
    ([np.float32(7)], f"prompt 0 has a float (7.0) {HERE}"),
    (np.array([7.0]), "must be integers of shape [B, T] or [T], got float64 [1]; give what a"),
    (torch.tensor([[7.0]]), "got torch.float32 [1, 1]"),
    ([True, False], f"prompt 0 has a bool (True) {HERE}"),
    ([np.True_], f"prompt 0 has a bool (True) {HERE}"),
    (torch.tensor([True]), "got torch.bool [1]"),
    ([None], f"prompt 0 has a NoneType {HERE}"),
    ([7, 8j], f"prompt 0 has a complex {HERE}"),
    # shapes
    (7, "the prompt is of type int; give text, a list of token ids"),
    (np.int64(7), "got int64 []"),
    (torch.tensor(7), "got torch.int64 []"),
    ([[[7]]], "prompt 0 is nested too deep: token ids have shape [T], or [B, T] for a batch"),
    ([[7], [[8]]], "prompt 1 is nested too deep"),
    ([7, [8]], "prompt 0 is nested too deep"),
    ([[7], 8], "prompt 1 is of type int"),
    (np.zeros((1, 1, 3), int), "got int64 [1, 1, 3]"),
    (
        [np.zeros((1, 3), int)],
        "prompt 0 is an array of shape [1, 3]; in a list, a prompt",
    ),
    ({7, 8}, "the prompt is of type set"),
    ((token for token in [7]), "the prompt is of type generator"),
    (lambda: 7, "the prompt is of type function"),
    # values
    ([7, VOCABULARY], "prompt 0 has a token id outside of the vocabulary (0..100): 101; encode it"),
    ([[7], [-1]], "prompt 1 has a token id outside of the vocabulary (0..100): -1"),
    ([-100], "outside of the vocabulary (0..100): -100"),
    (np.array([2**40]), "outside of the vocabulary"),
    ("w7 \ud800", "prompt 0 has a lone surrogate, which is not valid text"),
    # mappings
    ([MESSAGE], CHAT),
    ([[MESSAGE], [MESSAGE]], CHAT),
    (MESSAGE, CHAT),
    ({"messages": [MESSAGE]}, CHAT),
    ({}, "the mapping has no input_ids (its keys: none)"),
    ({"ids": [7], "mask": [1]}, "the mapping has no input_ids (its keys: ids, mask); give what a"),
    (
        {"input_ids": [7], "position_ids": [0], "labels": [7]},
        "position_ids, labels: unknown keys of a mapping, which may hold input_ids, "
        "attention_mask (and token_type_ids, without effect)",
    ),
    ([{"input_ids": [7]}, {"input_ids": [8]}], "prompt 0 is a mapping; give one mapping of the"),
    ({"input_ids": {"input_ids": [7]}}, "the prompt is of type dict"),
]


@pytest.mark.parametrize(
    ("given", "message"), REFUSED, ids=[message[:50] for _, message in REFUSED]
)
def test_what_is_no_prompt_is_refused_by_name(given: Any, message: str) -> None:
    with pytest.raises(GenerationError) as refused:
        READER.read(given)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": TEXT, "input_ids": [7]}, "inputs and input_ids both name the prompts"),
        ({"input_ids": TEXT}, "text is given as token ids"),
        ({"inputs": TEXT, "attention_mask": [1, 1, 1]}, "give text as the first argument, alone"),
        ({"attention_mask": [1]}, "no prompt was given"),
        (
            {"inputs": {"input_ids": [7], "attention_mask": [1]}, "attention_mask": [1]},
            "attention_mask is given twice",
        ),
        (
            {"inputs": ROWS, "attention_mask": [[1, 1]]},
            "whose rows have 2, 3 tokens, but its rows have 2",
        ),
        ({"inputs": ROWS, "attention_mask": MASK}, "whose rows have 2, 3 tokens, but its rows"),
        ({"inputs": [7], "attention_mask": [2]}, "1 for tokens and 0 for padding, got 2"),
        ({"inputs": [7], "attention_mask": [-np.inf]}, "1 for tokens and 0 for padding, got -inf"),
        ({"inputs": [7], "attention_mask": "1"}, "attention_mask is of type str"),
        ({"inputs": [7], "attention_mask": torch.tensor(1)}, "attention_mask is of type int"),
        ({"inputs": [7], "attention_mask": [0]}, "prompt 0 is empty"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_arguments_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError) as refused:
        READER.read(options.pop("inputs", None), **options)
    assert message in str(refused.value)


def test_one_id_or_several() -> None:
    for given in (2, np.int64(2), torch.tensor(2), [2], np.array([2]), torch.tensor([2])):
        assert read_ids(given, "eos_token_id") == [2]
    assert read_ids([], "eos_token_id") == []
    assert read_ids((2, np.int8(5)), "eos_token_id") == [2, 5]


def test_no_array_library_is_imported_to_tell() -> None:
    code = (
        "import sys; from sirius_runtime.prompts import PromptReader\n"
        "assert PromptReader(None, 9).read({'input_ids': [[7, 8]]}) == [[7, 8]]\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# a second BOS


@pytest.mark.parametrize("text", ["<s> w7", "<s>w7", ["w8", "<s> w7"]])
def test_a_second_bos_is_said_once(text: Any) -> None:
    prompts = reader(bos=True)
    with pytest.warns(PromptWarning, match=r"begins with <s> already.*add_special_tokens=False"):
        found = prompts.read(text)
    assert found[-1] == [1, 1, 7]  # as transformers has it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prompts.read(text)[-1] == [1, 1, 7]
        assert reader(bos=True).read(text, add_special_tokens=False)[-1] == [1, 7]


def test_one_bos_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reader(bos=True).read("w7") == [[1, 7]]
        assert reader(bos=True).read("w7", add_special_tokens=False) == [[7]]
        assert reader(bos=True).read([1, 1, 7]) == [[1, 1, 7]]  # ids are what they are
        assert reader(bos=True).read("w7 <s>") == [[1, 7, 1]]
        assert reader(bos=True).read("") == [[1]]
        assert reader().read("<s> <s> w7") == [[1, 1, 7]]


def test_generate_takes_text_as_it_is(tiny: TinyModels) -> None:
    tokenizer = word_tokenizer().backend_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    model = SiriusModel(tiny(method="griffin").model.backend, tokenizer)
    plain = model.generate("<s> w7", add_special_tokens=False, max_new_tokens=3)
    assert plain.prompts == ((1, 7),)
    assert plain.tokens == model.generate("w7", max_new_tokens=3).tokens
    with pytest.warns(PromptWarning) as said:
        model.generate("<s> w7", max_new_tokens=3)
    assert said[0].filename == __file__
