"""Calibration text: read from files, or from prompts that the model continues (`writing`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sirius_runtime.errors import CalibrationError

BUILTIN_PROMPTS = Path(__file__).parent / "calibration_prompts.jsonl"
WINDOW = 512  # tokens of a sample
MAX_TOKENS = 2_048
LEAST_TOKENS = 64
PREFIX = 16 * MAX_TOKENS  # characters read at first from a plain text
TOGETHER = 1_024  # tokens of the texts in one call


@dataclass(frozen=True)
class Sample:
    """Tokens of one text; the first `prompt` are the prompt, the rest counts as decoded."""

    tokens: tuple[int, ...]
    prompt: int

    def __len__(self) -> int:
        return len(self.tokens)


def read_windows(path: Path, tokenizer: Tokenizer, longest: int) -> list[Sample]:
    """Windows of a calibration file, which is JSONL with a ``text`` field on each line, or plain
    text. Reads at most `MAX_TOKENS` tokens.

    Raises CalibrationError if the file is neither.
    """
    if path.suffix == ".jsonl":
        return windows(_field(_lines(path), "text", path), tokenizer, longest)
    characters = PREFIX
    while True:
        text = _prefix(path, characters)
        ids = tokenizer.encode(text).ids
        # The last word may be cut off, so its tokens are dropped.
        if len(text) < characters or len(ids) > 2 * MAX_TOKENS:
            return _windows([ids], longest)
        characters *= 4


def _prefix(path: Path, characters: int) -> str:
    with _reading(path), path.open(encoding="utf-8") as file:
        return file.read(characters)


def _lines(path: Path) -> Iterator[str]:
    with _reading(path), path.open(encoding="utf-8", newline="\n") as file:
        yield from file


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError, ValueError) as error:  # not UTF-8, or a zero byte in the name
        raise CalibrationError(
            f"calibration file {path} can't be read as UTF-8 text ({error}); give plain text or "
            "JSONL with a 'text' field, or --calibration builtin"
        ) from error


def read_prompts(path: Path) -> list[str]:
    """The prompts of a calibration file, built-in or a model's own: JSONL with a ``prompt`` field.

    Raises CalibrationError for a file of another form, or without prompts.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} can't be read as UTF-8 text ({error})") from error
    prompts = list(_field(content.split("\n"), "prompt", path))
    if not prompts:
        raise CalibrationError(
            f"{path} holds no prompts; add some, remove it, or give text with --calibration"
        )
    return prompts


def _field(lines: Iterable[str], field: str, path: Path) -> Iterator[str]:
    """The text in a field of each line of JSONL."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
            if not isinstance(text, str):
                raise TypeError
            text.encode()  # refuses lone surrogates
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CalibrationError(
                f"calibration file {path}, line {number}: expected a JSON object with text in its "
                f"field {field!r}"
            ) from error
        yield text


def windows(texts: Iterable[str], tokenizer: Tokenizer, longest: int) -> list[Sample]:
    """Windows of the texts' token ids, at most `MAX_TOKENS` tokens in all. The first half of each
    window counts as its prompt. `longest`: the model's longest sequence, which bounds a window.
    """
    return _windows((tokenizer.encode(text).ids for text in texts), longest)


def _windows(texts: Iterable[list[int]], longest: int) -> list[Sample]:
    size = min(WINDOW, longest)
    found: list[list[int]] = []
    left = MAX_TOKENS
    for ids in texts:
        ids = ids[:left]
        left -= len(ids)
        found += [ids[i : i + size] for i in range(0, len(ids), size)]
        if not left:
            break
    return [Sample(tuple(w), max(1, len(w) // 2)) for w in found if w]


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Groups texts of these lengths into calls; returns the indices of each call's texts.

    A call has texts of similar length, at most `TOGETHER` tokens with padding, or one longer text.
    """
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not found or (len(found[-1]) + 1) * lengths[index] > TOGETHER:
            found.append([])
        found[-1].append(index)
    return found


def padded(texts: Sequence[Sequence[int]]) -> Tensor:
    """Tokens as rows [R, T], padded with token 0."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    return ids


def check_amount(tokens: int) -> None:
    """Raises CalibrationError if there are too few tokens."""
    if tokens < LEAST_TOKENS:
        raise CalibrationError(
            f"the calibration text has {tokens} tokens, but at least {LEAST_TOKENS} are needed. "
            "Give more with --calibration, or leave it out for the built-in text"
        )


def hold_out(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Splits samples into calibration text and held-out text, which is a quarter of all: every
    fourth sample, or the last quarter of each if there are fewer than four.
    """
    if len(samples) >= 4:
        return [s for i, s in enumerate(samples) if i % 4 < 3], list(samples[3::4])
    used, held = [], []
    for sample in samples:
        cut = len(sample) - len(sample) // 4
        used.append(Sample(sample.tokens[:cut], min(sample.prompt, cut)))
        rest = sample.tokens[cut:]
        if rest:
            held.append(Sample(rest, max(1, len(rest) // 2)))
    return used, held
