"""Tokens to text as they come: any text, any cut into tokens, any stop strings."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sirius_runtime.text import (
    IncrementalDecoder,
    StopScanner,
    TextStream,
    answer_text,
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


LLAMA_PIECES = ["<unk>", "<s>", EOS, *(f"<0x{b:02X}>" for b in range(256))]
LLAMA_PIECES += ["▁", "▁Hello", "▁world", "▁a", "Hello", "a", "b", "!", "é", "▁▁"]
WORD_PIECES = ["[UNK]", "[CLS]", EOS, "hello", "world", "##ly", "##s", "!", "a"]


def llama_2() -> Tokenizer:
    """As Llama 2's: words with their space before them, bytes where there is no piece; decoding
    drops the first space.
    """
    pieces = {piece: index for index, piece in enumerate(LLAMA_PIECES)}
    tokenizer = Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", EOS])
    return tokenizer


def word_piece() -> Tokenizer:
    """Words without their spaces, which decoding puts between them."""
    pieces = {piece: index for index, piece in enumerate(WORD_PIECES)}
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[CLS]", EOS])
    return tokenizer


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """Token ids of pieces; of the bytes of what is none."""
    ids: list[int] = []
    for piece in pieces:
        known = tokenizer.token_to_id(piece)
        if known is None:
            ids += [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in piece.encode()]
        else:
            ids.append(known)
    return ids


MANY = settings(max_examples=150)  # they are cheap
TOKENIZERS = {"byte_level": byte_level(), "metaspace": metaspace()}
LLAMA, WORDS = llama_2(), word_piece()
EVERY = {**TOKENIZERS, "llama_2": LLAMA, "word_piece": WORDS}
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


# after a prompt


AFTER: list[tuple[Tokenizer, list[str], list[str], list[str]]] = [
    # the space between prompt and answer is the answer's
    (LLAMA, ["<s>", "▁Hello"], ["▁world", "!"], [" world", "!"]),
    (LLAMA, ["<s>", "▁Hello", EOS], ["▁world"], [" world"]),
    (LLAMA, ["▁Hello", "▁"], ["▁", "▁a"], [" ", " a"]),
    (LLAMA, ["▁Hello", "!"], [EOS, "▁world"], ["", " world"]),
    (LLAMA, ["▁Hello"], ["Hello"], ["Hello"]),
    (TOKENIZERS["metaspace"], ["▁a"], ["▁bc", "a"], [" bc", "a"]),
    (TOKENIZERS["metaspace"], ["a"], ["▁▁", "▁a"], ["  ", " a"]),
    (WORDS, ["[CLS]", "hello"], ["world", "##ly", "!"], [" world", "ly", "!"]),
    (WORDS, ["hello"], ["##s", "a"], ["s", " a"]),
    # nothing before it: the text begins here, and its space is the tokenizer's own
    (LLAMA, [], ["▁world", "▁a"], ["world", " a"]),
    (LLAMA, ["<s>"], ["▁world"], ["world"]),
    # characters of several bytes
    (LLAMA, ["▁Hello"], ["▁", "好", "▁a"], [" ", "", "", "好", " a"]),
    (LLAMA, ["▁Hello", "好"], ["好", "a"], ["", "", "好", "a"]),
    (LLAMA, ["▁Hello", "好好好好"], ["🙂"], ["", "", "", "🙂"]),
    (LLAMA, ["好" * 30], ["好"], ["", "", "好"]),
    (LLAMA, ["▁Hello"], ["好", "<0xE5>", "a"], ["", "", "好", "", "\ufffda"]),
    # the prompt ends within a character
    (LLAMA, ["a", "<0xE5>", "<0xA5>"], ["<0xBD>", "a"], ["好", "a"]),
    (LLAMA, ["a", "<0xE5>", "<0xA5>"], ["▁a", "b"], [" a", "b"]),
    (LLAMA, ["a", "<0xF0>"], ["<0x9F>", "b"], ["", "\ufffdb"]),
    (LLAMA, ["<0xE5>"], ["<0xA5>", "<0xBD>", "▁a"], ["", "好", " a"]),
    (LLAMA, ["<0xE5>"], ["<0xA5>", "<0xBD>", "好", "a"], ["", "好", "", "", "好", "a"]),
    # which ends with what looks like one
    (LLAMA, ["a", "\ufffd"], ["▁a", "b"], [" a", "b"]),
]


@pytest.mark.parametrize(("tokenizer", "prompt", "answer", "pieces"), AFTER)
def test_what_an_answer_adds_to_its_prompt(
    tokenizer: Tokenizer, prompt: list[str], answer: list[str], pieces: list[str]
) -> None:
    before, ids = ids_of(tokenizer, *prompt), ids_of(tokenizer, *answer)
    decoder = IncrementalDecoder(tokenizer, before)
    assert [decoder.add(token) for token in ids] == pieces
    assert decoder.flush() == ""
    text = "".join(pieces)
    assert answer_text(tokenizer, before, ids) == text
    written: list[str] = []
    stream = TextStream(tokenizer, written.append)
    for put in ([before], ids):
        stream.put(put)
    stream.end()
    assert "".join(written) == text


def test_the_prompt_may_end_within_a_character_of_byte_level() -> None:
    euro = byte_ids("a€".encode())
    decoder = IncrementalDecoder(BYTES, euro[:-1])
    assert [decoder.add(token) for token in [euro[-1], *byte_ids(b"b")]] == ["€", "b"]
    decoder = IncrementalDecoder(BYTES, euro[:-1])
    assert [decoder.add(token) for token in byte_ids(b"b")] == ["b"]


@pytest.mark.parametrize("name", EVERY)
@MANY
@given(data=st.data())
def test_prompt_and_answer_join_to_the_text_of_both(name: str, data: st.DataObject) -> None:
    """Wherever the prompt ends, and however long it is."""
    tokenizer = EVERY[name]
    if name == "byte_level":
        ids = data.draw(tokenised())
    else:  # whole characters: see above for others
        pieces = LLAMA_PIECES[259:] if name == "llama_2" else list(tokenizer.get_vocab())
        pieces += ["好", "🙂"] if name == "llama_2" else []
        ids = ids_of(tokenizer, *data.draw(st.lists(st.sampled_from([*pieces, EOS]), max_size=30)))
    cut = data.draw(st.integers(0, len(ids)))
    prompt, answer = tokenizer.decode(ids[:cut]), answer_text(tokenizer, ids[:cut], ids[cut:])
    assert prompt.rstrip("\ufffd") + answer == tokenizer.decode(ids)


@pytest.mark.parametrize("name", EVERY)
@MANY
@given(data=st.data())
def test_a_stream_after_a_prompt_is_its_text(name: str, data: st.DataObject) -> None:
    """Of any ids, broken characters among them."""
    tokenizer = EVERY[name]
    prompt, ids = data.draw(any_ids(tokenizer)), data.draw(any_ids(tokenizer))
    written: list[str] = []
    stream = TextStream(tokenizer, written.append)
    stream.put([prompt])
    for token in ids:
        stream.put([token])
    stream.end()
    assert "".join(written) == answer_text(tokenizer, prompt, ids)


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


CHATTY = byte_level()
CHATTY.add_special_tokens(["<|im_end|>", "<|im_end|>x", "<|call|>"])
CHATTY.add_tokens([AddedToken("<think>", special=False, normalized=False)])


@pytest.mark.parametrize(
    ("answer", "stop", "count", "text"),
    [
        ("ab<|im_end|>cd", ["<|im_end|>"], 3, "ab"),
        ("<|im_end|>cd", ["<|im_end|>"], 1, ""),
        ("ab<|im_end|>cd", ["b<|im_end|>"], 3, "a"),
        ("ab<|im_end|>cd", ["<|im_end|>cd"], 5, "ab"),
        ("ab<|im_end|>cd", ["d", "b<|im_end|>c"], 4, "a"),
        ("a<|call|>b<|call|><|im_end|>c", ["<|call|><|im_end|>"], 5, "ab"),
        ("a<|im_end|>xb<|im_end|>b", ["<|im_end|>"], 4, "ab"),  # the first is another token
        ("a<|im_end|>xb", ["<|im_end|>x"], 2, "a"),
        ("ab<think>c", ["<think>"], 3, "ab"),  # which is shown
        ("ab" + EOS + "c", ["d", EOS], 3, "ab"),
        # not named by any: it is not there
        ("ab<|im_end|>cd", ["bc"], 4, "a"),
        ("ab<|im_end|>cd", ["<|im_end", "|>"], None, "abcd"),
        ("ab<|im_end|>cd", ["<|call|>"], None, "abcd"),
        ("ab<|im_end|>cd", ["<|im_end|>d"], None, "abcd"),
        ("a€<|im_end|>", ["€<|im_end|>"], 5, "a"),
    ],
)
def test_special_tokens_in_stop_strings(
    answer: str, stop: list[str], count: int | None, text: str
) -> None:
    """They were left out of the text that is searched, and so never found."""
    prompt, ids = CHATTY.encode("a b").ids, CHATTY.encode(answer).ids
    scanner = StopScanner(CHATTY, stop, prompt)
    stopped = next((n for n, token in enumerate(ids, 1) if scanner.stops_at(token)), None)
    assert stopped == count
    assert answer_text(CHATTY, prompt, ids[:count], stop) == text
    written: list[str] = []
    text_stream = TextStream(CHATTY, written.append, stop)
    for put in [prompt, *([token] for token in ids[:count])]:
        text_stream.put(put)
    text_stream.end()
    assert "".join(written) == text


def test_a_stop_string_with_the_space_after_the_prompt() -> None:
    prompt, ids = ids_of(LLAMA, "<s>", "▁Hello"), ids_of(LLAMA, "▁world", "▁a")
    scanner = StopScanner(LLAMA, [" world"], prompt)
    assert scanner.stops_at(ids[0])
    assert answer_text(LLAMA, prompt, ids, [" world"]) == ""


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
