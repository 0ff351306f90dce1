"""A stranger's tokenizer: what is refused before it is read, and what its failures become."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from sirius_runtime import load
from sirius_runtime.errors import ArtifactError
from sirius_runtime.loading import TOKENIZER
from sirius_runtime.spec import JSON
from sirius_runtime.tokenizer_guard import check_tokenizer, fault_of, guarded, panics_caught
from tests.support.artifacts import rebuild
from tests.support.models import TinyModels, word_tokenizer

KNOWN = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)|\s+",
    "deepseek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "clip": r"<\|startoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "cjk": r"[一-龥぀-ゟ゠-ヿ]+",
    "possessive": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+",
    "threes from the right": r"(?=(\d{3})+(?!\d))",
    "threes": r"\d{1,3}(?=(?:\d{3})*\b)",
    "spaces": r" {2,}",
    "code point": r"\x{1F600}+",
}


@pytest.mark.parametrize("name", KNOWN)
def test_patterns_of_well_known_tokenizers_pass(name: str) -> None:
    assert fault_of(KNOWN[name]) is None


NESTED = [
    *(r"(a+)+b", r"(a|a)*b", r"(a*)*", r"(?:x+x+)+y", r"((a{1,50}){1,50}){1,10}"),
    *(r"(?:a?){64}", r"([ab]+c?)*", r"((ab)*)+", r"(?:(?:a|b)c)+", r"(?>a+)+", r"(a+){2,}"),
    *(r"(?:\p{L}+)*", r"a**", r"a{2,5}{3,6}", r"((a{60}){60}){60}", r"(?<name>a|b)+"),
]
LONG = [r"a{1,1000}", r"a{,500}", r"a{99999999999}", r"\p{L}{65}"]
BACK = [r"(.)\1", r"(?<x>a\g<x>?b)", r"(?<x>a)\k<x>"]


@pytest.mark.parametrize("pattern", [*NESTED, *LONG, *BACK])
def test_patterns_whose_search_may_not_end_are_refused(pattern: str) -> None:
    expected = "repeats a" if pattern in NESTED else "repeats more" if pattern in LONG else "has a"
    assert (fault_of(pattern) or "").startswith(expected)


def tokenizer(**parts: JSON) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(word_tokenizer().backend_tokenizer.to_str())
    return {**document, **parts}


def replace(content: str, **pattern: str) -> JSON:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*normalizers: JSON) -> JSON:
    return {"type": "Sequence", "normalizers": list(normalizers)}


def split(pattern: str) -> JSON:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def template(times: int, ids: int, single: JSON = None) -> JSON:
    """A template that puts a special token, of so many ids, before a text so many times."""
    special = {"id": "<s>", "ids": [1] * ids, "tokens": ["<s>"] * ids}
    piece, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}
    return {
        "type": "TemplateProcessing",
        "single": single or [*[piece] * times, text],
        "pair": [text],
        "special_tokens": {"<s>": special},
    }


def charsmap(longest: int) -> JSON:
    """A map of characters, of an empty trie, that writes a text of so many."""
    texts = b"a\0" + "\u00e9".encode() * longest + b"\0"
    data = base64.b64encode((0).to_bytes(4, "little") + texts).decode()
    return {"type": "Precompiled", "precompiled_charsmap": data}


def words(**parts: JSON) -> JSON:
    return {**tokenizer()["model"], **parts}


WORD = "w" * 8193
REFUSED: dict[str, tuple[JSON, str]] = {
    "nested": (tokenizer(pre_tokenizer=split("(a+)+b")), "repeats a group"),
    "deep inside": (
        tokenizer(
            decoder={"type": "Sequence", "decoders": [replace("x", Regex="(a|b)*")]},
        ),
        "repeats a group",
    ),
    "long": (tokenizer(normalizer=replace("x", Regex=r"\p{L}" * 900)), "more than 4096 characters"),
    "many": (
        tokenizer(normalizer=sequence(*[replace("x", Regex=r"\p{L}" * 100)] * 9)),
        "more than 4096 characters together",
    ),
    "growing": (
        tokenizer(normalizer=sequence(*[replace("aaaaaaaaaa", String="a")] * 9)),
        "lengthen a text up to 1000000000 times",
    ),
    "growing from nothing": (
        tokenizer(normalizer=replace("a" * 100, String="")),
        "lengthen a text up to 100 times",
    ),
    "prepended": (
        tokenizer(normalizer={"type": "Prepend", "prepend": "a" * 1000}),
        "lengthen a text up to 1000 times",
    ),
    "a long map": (tokenizer(normalizer=charsmap(100)), "lengthen a text up to 100 times"),
    "a map and more": (
        tokenizer(normalizer=sequence(charsmap(18), replace("aaaa", String="a"))),
        "lengthen a text up to 72 times",
    ),
    "a template": (tokenizer(post_processor=template(257, 1)), "templates add 257 tokens"),
    "of large tokens": (tokenizer(post_processor=template(20, 2000)), "add 40000 tokens"),
    "as text": (tokenizer(post_processor=template(0, 300, "<s>:0 $A:0")), "add 300 tokens"),
    "as texts": (tokenizer(post_processor=template(0, 300, ["<s>:0", "$A:0"])), "add 300 tokens"),
    "of several": (
        tokenizer(post_processor={"type": "Sequence", "processors": [template(100, 1)] * 3}),
        "templates add 300 tokens",
    ),
    "a long word": (tokenizer(model=words(vocab={WORD: 0})), "a text of 8193 characters"),
    "a long piece": (
        tokenizer(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0], [WORD, -1]]}),
        "a text of 8193 characters",
    ),
    "a long prefix": (
        tokenizer(model=words(continuing_subword_prefix=WORD)),
        "a text of 8193 characters",
    ),
    "a long added token": (
        tokenizer(added_tokens=[{"id": 0, "content": WORD}]),
        "a text of 8193 characters",
    ),
    "a list": ([], "it is not an object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_it_is_read(case: str) -> None:
    document, message = REFUSED[case]
    with pytest.raises(ArtifactError, match=message):
        check_tokenizer(json.dumps(document).encode())


def test_what_is_no_json_or_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(ArtifactError, match="it is not JSON"):
            check_tokenizer(content)
    from sirius_runtime import tokenizer_guard

    monkeypatch.setattr(tokenizer_guard, "MOST_BYTES", 10)
    with pytest.raises(ArtifactError, match="it has 11 bytes, at most 10 are read"):
        check_tokenizer(b" " * 11)


def test_a_tokenizer_as_others_is_read() -> None:
    check_tokenizer(json.dumps(tokenizer()).encode())
    spaces = sequence({"type": "Prepend", "prepend": "▁"}, replace("▁", String=" "))
    check_tokenizer(json.dumps(tokenizer(normalizer=spaces)).encode())
    others = tokenizer(normalizer=charsmap(18), post_processor=template(2, 1))
    check_tokenizer(json.dumps(others).encode())


@pytest.mark.parametrize(
    "part",
    [
        {"model": None},
        {"model": []},
        {"model": [1]},
        {"model": "x"},
        {"model": {"vocab": [[], 7, [1]]}},
        {"post_processor": {"special_tokens": {"<s>": {"ids": 7}}, "single": 7}},
        {"post_processor": {"special_tokens": [], "single": [[]]}},
        {"post_processor": {"special_tokens": {"a": 1}, "single": [{"SpecialToken": {"id": []}}]}},
        {"normalizer": {"precompiled_charsmap": 7}},
        {"normalizer": {"precompiled_charsmap": "no base64!"}},
        {"normalizer": {"precompiled_charsmap": ""}},
    ],
)
def test_what_is_no_tokenizer_is_left_to_the_library(part: JSON) -> None:
    check_tokenizer(json.dumps(tokenizer(**part)).encode())


@pytest.fixture(scope="module")
def artifact(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", "topk").compiled.save(tmp_path_factory.mktemp("guard") / "model.sirius")


def with_tokenizer(artifact: Path, folder: Path, **parts: JSON) -> Path:
    path = folder / "model.sirius"
    path.write_bytes(artifact.read_bytes())
    text = json.dumps(tokenizer(**parts)).encode()
    rebuild(path, lambda entries: entries.update({TOKENIZER: text}))
    return path


def test_it_is_asked_at_load(artifact: Path, tmp_path: Path) -> None:
    path = with_tokenizer(artifact, tmp_path, normalizer=replace("x", Regex="(a+)+b"))
    with pytest.raises(ArtifactError, match=r"model\.sirius: tokenizer/.* is refused: its pattern"):
        load(path, device="cpu")


def test_a_panic_at_load_is_an_error(artifact: Path, tmp_path: Path) -> None:
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    path = with_tokenizer(artifact, tmp_path, normalizer=charsmap)
    with pytest.raises(ArtifactError, match="can't be read by this version of tokenizers"):
        load(path, device="cpu")


def test_a_panic_at_a_prompt_is_an_error(artifact: Path, tmp_path: Path) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "ghost", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    model = load(with_tokenizer(artifact, tmp_path, post_processor=template), device="cpu")
    with pytest.raises(ArtifactError, match="the artifact's tokenizer failed"):
        model.generate("w7 w8")
    assert model.generate([7, 8], max_new_tokens=2).stats.tokens == 2


def test_an_error_of_the_library_at_a_prompt_is_one_of_ours(artifact: Path, tmp_path: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"w7": 7}, "unk_token": "ghost"}
    model = load(with_tokenizer(artifact, tmp_path, model=words), device="cpu")
    with pytest.raises(ArtifactError, match=r"tokenizer failed \(WordLevel error: Missing"):
        model.generate("another")


class PanicException(BaseException):
    """As pyo3 names it."""


def test_panics_alone_are_caught_where_others_code_runs() -> None:
    for guard in (guarded, panics_caught):
        with pytest.raises(ArtifactError, match=r"failed \(index out of bounds\)"), guard():
            raise PanicException("index out of bounds\nmore")
        with pytest.raises(KeyboardInterrupt), guard():
            raise KeyboardInterrupt
        with pytest.raises(ValueError, match="mine"), guard():
            raise ValueError("mine")
    with pytest.raises(Exception, match=r"^mine$"), panics_caught():
        raise Exception("mine")
