"""Tokens to text as they come: any text, any cut into tokens, any stop strings."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sirius_runtime.text import (
    IncrementalDecoder,
    StopScanner,
    TextStream,
    cut_at_stop,
    read_tokenizer,
)

CORPUS = [
    "der Fluß fließt über die Brücke",
    "你好，世界。你好",
    "naïve café",
    "🙂🙃 a🙂b",
    "\n\n  x",
]
EOS = "</s>"


def byte_level() -> Tokenizer:
    """Byte-level BPE: a character of several bytes may be split over tokens, or merged whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """Words with their space before them, which decoding drops from the first: as SentencePiece."""
    pieces = [EOS, "▁", "▁a", "▁bc", "a", "b", "c", "é", "▁▁"]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token=EOS))
    tokenizer.add_special_tokens([EOS])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


MANY = settings(max_examples=150)  # they are cheap
TOKENIZERS = {"byte_level": byte_level(), "metaspace": metaspace()}
BYTES = TOKENIZERS["byte_level"]
texts = st.text(st.sampled_from(sorted(set("".join(CORPUS))) + list("€ßabc")), max_size=20)
stops = st.lists(
    st.text(st.sampled_from("ab 🙂你é\n"), min_size=1, max_size=4), min_size=1, max_size=3
)


def byte_ids(content: bytes) -> list[int]:
    """The tokens of single bytes, however they would be merged."""
    names = {byte: name for name, byte in zip(_byte_names(), range(256), strict=True)}
    return [BYTES.token_to_id(names[byte]) for byte in content]


def _byte_names() -> list[str]:
    """GPT-2's printable character of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@st.composite
def tokenised(draw: st.DrawFn) -> list[int]:
    """Tokens of some text: merged ones, single bytes, or a mix; a special token in between."""
    ids: list[int] = []
    for text in draw(st.lists(texts, max_size=4)):
        kind = draw(st.sampled_from(["merged", "bytes", "special"]))
        ids += BYTES.encode(text).ids if kind == "merged" else byte_ids(text.encode())
        ids += [BYTES.token_to_id(EOS)] if kind == "special" else []
    return ids


def any_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Token ids as they come: broken characters among them."""
    return st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=25)


def test_the_tokenizer_splits_characters_and_merges_others() -> None:
    assert len(BYTES.encode("€").ids) == 3
    assert len(BYTES.encode("你好").ids) == 1
    assert BYTES.decode(byte_ids("€".encode())) == "€"


# IncrementalDecoder


@pytest.mark.parametrize("name", TOKENIZERS)
@MANY
@given(data=st.data())
def test_pieces_join_to_the_text(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(any_ids(tokenizer))
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.add(token) for token in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


@MANY
@given(tokenised())
def test_text_is_out_as_soon_as_its_characters_are_whole(ids: list[int]) -> None:
    decoder = IncrementalDecoder(BYTES)
    out = ""
    for count, token in enumerate(ids, start=1):
        out += decoder.add(token)
        text = BYTES.decode(ids[:count])
        assert text.startswith(out)
        assert out == text or text.endswith("\N{REPLACEMENT CHARACTER}")
    assert decoder.flush() == ""


def test_unfinished_character_is_held_back_then_flushed() -> None:
    decoder = IncrementalDecoder(BYTES)
    euro = byte_ids("€".encode())
    assert [decoder.add(token) for token in [*euro, *euro[:2]]] == ["", "", "€", "", ""]
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.flush() == ""


def test_special_tokens_have_no_text() -> None:
    decoder = IncrementalDecoder(BYTES)
    ids = [*byte_ids(b"a"), BYTES.token_to_id(EOS), *byte_ids(b"b")]
    assert [decoder.add(token) for token in ids] == ["a", "", "b"]


# stop strings


def count_to_stop(ids: Sequence[int], stop: Sequence[str]) -> int:
    """How many tokens it takes until whole characters spell a stop string; all, where none does."""
    for count in range(1, len(ids) + 1):
        if any(s in BYTES.decode(ids[:count]) for s in stop):
            return count
    return len(ids)


@MANY
@given(tokenised(), stops)
def test_scanner_stops_at_the_token_that_completes_a_stop(ids: list[int], stop: list[str]) -> None:
    scanner = StopScanner(BYTES, stop)
    stopped = [scanner.stops_at(token) for token in ids]
    count = count_to_stop(ids, stop)
    found = any(s in BYTES.decode(ids) for s in stop)
    assert stopped[:count] == [False] * (count - 1) + [found] if count else not stopped


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abcabc", ["c"], "ab"),
        ("abcabc", ["ca", "b"], "a"),
        ("abcabc", ["x"], "abcabc"),
        ("abcabc", ["abc", "b"], ""),
        ("abc", [], "abc"),
        ("", ["a"], ""),
    ],
)
def test_cut_at_the_first_stop(text: str, stop: list[str], expected: str) -> None:
    assert cut_at_stop(text, stop) == expected


# TextStream


def stream(puts: Sequence[Sequence[int]], stop: Sequence[str] = ()) -> list[str]:
    """What a TextStream writes, the prompt put first."""
    written: list[str] = []
    text_stream = TextStream(BYTES, written.append, stop)
    for tokens in [byte_ids(b"prompt ab"), *puts]:
        text_stream.put(tokens)
    text_stream.end()
    return written


@st.composite
def periods(draw: st.DrawFn) -> list[list[int]]:
    """Tokens as periods commit them."""
    ids = draw(tokenised())
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@MANY
@given(periods(), stops)
def test_writes_join_to_the_text_before_the_stop(puts: list[list[int]], stop: list[str]) -> None:
    ids = [token for put in puts for token in put]
    ids = ids[: count_to_stop(ids, stop)]  # `generate` ends the row there
    left = len(ids)
    ended: list[list[int]] = []
    for put in puts:
        ended.append(put[:left])
        left -= len(ended[-1])
    assert "".join(stream(ended, stop)) == cut_at_stop(BYTES.decode(ids), stop)


@MANY
@given(periods())
def test_writes_join_to_the_text(puts: list[list[int]]) -> None:
    ids = [token for put in puts for token in put]
    assert "".join(stream(puts)) == BYTES.decode(ids)


@MANY
@given(periods(), stops)
def test_only_a_possible_stop_is_held_back(puts: list[list[int]], stop: list[str]) -> None:
    ids = [token for put in puts for token in put]
    text = BYTES.decode(ids)
    assume(not any(s in text for s in stop))
    written: list[str] = []
    text_stream = TextStream(BYTES, written.append, stop)
    text_stream.put([])
    text_stream.put(ids)
    held = text.removeprefix("".join(written))
    begins = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    assert len(held) == max(begins, default=0)


def test_possible_stop_is_shown_once_it_is_none() -> None:
    puts = [byte_ids(text) for text in (b"a", b"\n", b"\n", b"b")]
    assert stream(puts, ["\n\nc"]) == ["a", "\n\nb"]
    assert stream(puts, ["\n\nb"]) == ["a"]
    assert stream(puts[:3], ["\n\nb"]) == ["a", "\n\n"]


def test_nothing_is_written_after_a_stop() -> None:
    puts = [byte_ids(text) for text in (b"a", b"stop", b"b")]
    assert stream(puts, ["stop"]) == ["a"]


def test_unfinished_character_is_written_at_the_end() -> None:
    assert stream([byte_ids("a€".encode())[:-1]]) == ["a", "\N{REPLACEMENT CHARACTER}"]


# tokenizers from files


def test_saved_padding_and_truncation_are_left_behind() -> None:
    saved = byte_level()
    saved.enable_padding(length=9)
    saved.enable_truncation(2)
    read = read_tokenizer(saved.to_str().encode())
    assert read.encode("abc").ids == BYTES.encode("abc").ids
    assert read.decode(read.encode("你🙂").ids) == "你🙂"
