"""An artifact's tokenizer has every added token of the model, whichever file declares it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from sirius_compile.models import ModelSource
from sirius_compile.tokenizer import tokenizer_files
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.text import StopScanner, read_tokenizer

PIECES = ["<unk>", "<s>", "</s>", *"abc<x>/s"]
TEXT = "a<x>b</s>c<y>a <z> b"
CONFIG = "tokenizer_config.json"


def base(*added: AddedToken) -> Tokenizer:
    """A tokenizer of characters, that knows <unk> as its one special token, and `added`."""
    pieces = {piece: id for id, piece in enumerate(dict.fromkeys(PIECES))}
    tokenizer = Tokenizer(models.BPE(pieces, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.add_tokens(list(added))
    return tokenizer


NEXT = base().get_vocab_size()


def source(folder: Path, files: dict[str, Any], tokenizer: Tokenizer | None = None) -> ModelSource:
    (folder / "tokenizer.json").write_text((tokenizer or base()).to_str())
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return ModelSource(folder, "model", None, False)


def stored(files: Any) -> Tokenizer:
    return read_tokenizer(tokenizer_files(files)["tokenizer.json"])


def token(content: str, **flags: bool) -> dict[str, Any]:
    fields = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **fields, "special": True, **flags}


TYPED = {"__type": "AddedToken"}
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}
DECLARED: list[dict[str, Any]] = [
    {CONFIG: {**GENERIC, "eos_token": "</s>"}},
    {CONFIG: {**GENERIC, "bos_token": TYPED | token("<s>"), "eos_token": TYPED | token("</s>")}},
    {CONFIG: GENERIC, "added_tokens.json": {"<y>": NEXT + 1, "<x>": NEXT}},
    {CONFIG: {**GENERIC, "pad_token": "<x>"}, "added_tokens.json": {"<x>": NEXT, "<y>": NEXT + 1}},
    {CONFIG: {**GENERIC, "added_tokens_decoder": {str(NEXT): token("<x>", special=False)}}},
    {
        CONFIG: {
            **GENERIC,
            "eos_token": "<y>",
            "added_tokens_decoder": {
                str(NEXT + 2): token("<z>", lstrip=True, rstrip=True),
                str(NEXT): token("<x>"),
                str(NEXT + 1): token("<y>", special=False),
            },
        }
    },
    {CONFIG: {**GENERIC, "extra_special_tokens": ["<x>", "<y>"]}},
    {CONFIG: {**GENERIC, "additional_special_tokens": ["<x>", "<y>"]}},
    {CONFIG: {**GENERIC, "extra_special_tokens": {"image_token": "<x>"}}},
    {CONFIG: {**GENERIC, "image_token": "<x>", "add_bos_token": False, "model_max_length": 9}},
    {CONFIG: GENERIC, "special_tokens_map.json": {"eos_token": token("</s>"), "pad_token": "<x>"}},
    {CONFIG: GENERIC},
    {},
]


@pytest.mark.parametrize("files", DECLARED, ids=lambda files: json.dumps(files)[:70])
def test_tokens_are_those_of_transformers(tmp_path: Path, files: dict[str, Any]) -> None:
    """The runtime reads only tokenizer.json, so tokens of other files would be split."""
    found = stored(source(tmp_path, files))
    wanted = AutoTokenizer.from_pretrained(tmp_path)
    ids = found.encode(TEXT).ids
    assert ids == wanted(TEXT)["input_ids"]
    assert found.decode(ids) == wanted.decode(ids, skip_special_tokens=True)
    assert repr(found.get_added_tokens_decoder()) == repr(wanted.added_tokens_decoder)


def test_the_config_s_flags_count_more_than_tokenizer_json_s(tmp_path: Path) -> None:
    files = {CONFIG: {**GENERIC, "added_tokens_decoder": {str(NEXT): token("<x>", lstrip=True)}}}
    model = source(tmp_path, files, base(AddedToken("<x>", special=False, normalized=False)))
    added = stored(model).get_added_tokens_decoder()
    assert repr(added) == repr(AutoTokenizer.from_pretrained(tmp_path).added_tokens_decoder)
    assert added[NEXT].special
    assert added[NEXT].lstrip


def test_ids_of_tokenizer_json_count_more_than_others(tmp_path: Path) -> None:
    """An old added_tokens.json beside it changes nothing."""
    model = source(tmp_path, {"added_tokens.json": {"<x>": 77}}, base(AddedToken("<x>")))
    assert stored(model).token_to_id("<x>") == NEXT


def test_a_complete_file_is_stored_as_it_is(tmp_path: Path) -> None:
    tokenizer = base()
    tokenizer.enable_truncation(7)
    files = {CONFIG: {**GENERIC, "unk_token": "<unk>", "pad_token": ""}}
    found = tokenizer_files(source(tmp_path, files, tokenizer))
    assert found["tokenizer.json"] == tokenizer.to_str().encode()
    assert list(found) == ["tokenizer.json", CONFIG]


def test_a_declared_special_token_stops_and_is_not_shown(tmp_path: Path) -> None:
    tokenizer = stored(source(tmp_path, {CONFIG: {**GENERIC, "eos_token": "<x>"}}))
    ids = tokenizer.encode("a<x>b").ids
    assert tokenizer.decode(ids) == "ab"
    scanner = StopScanner(tokenizer, ["<x>"])
    assert [scanner.stops_at(id) for id in ids[:2]] == [False, True]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"added_tokens.json": {"<x>": NEXT + 3}},
            f"added_tokens.json declares token '<x>' with id {NEXT + 3}, but the next free id "
            f"in tokenizer.json is {NEXT}. Declare the tokens between",
        ),
        (
            {CONFIG: {"added_tokens_decoder": {str(NEXT + 1): token("<y>")}}},
            f"{CONFIG} declares token '<y>' with id {NEXT + 1}, but the next free id in",
        ),
        ({CONFIG: "{"}, f"{CONFIG} is not JSON ("),
        ({CONFIG: "[" * 100_000}, f"{CONFIG} is not JSON ("),
        ({"added_tokens.json": ["<x>"]}, "added_tokens.json holds a list instead of an object"),
        (
            {CONFIG: {"added_tokens_decoder": ["<x>"]}},
            "holds a list of tokens instead of",
        ),
        ({CONFIG: {"added_tokens_decoder": {"9": {}}}}, "declares a token without content ('{}')"),
        ({"added_tokens.json": {"<x>": "first"}}, "gives a token the id 'first'"),
        ({"added_tokens.json": {"<x>": None}}, "gives a token the id 'None'"),
        ({CONFIG: {"additional_special_tokens": [5]}}, "declares a token without content ('5')"),
        ({"tokenizer.json": "{}"}, "tokenizer.json can't be read by this version of tokenizers ("),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_can_t_be_stored_is_said(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        tokenizer_files(source(tmp_path, files))
    assert message in str(refused.value)
