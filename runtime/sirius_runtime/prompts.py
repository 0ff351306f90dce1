"""Reads the prompts of `generate` to rows of token ids. Values of other types are refused with a
message, never guessed at.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding, Tokenizer

from sirius_runtime.errors import GenerationError, shown
from sirius_runtime.tokenizer_guard import guarded

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Array = Tensor | np.ndarray
    Ids = Sequence[int] | Sequence[Sequence[int]] | Array
    Inputs = str | Sequence[str | Sequence[int]] | Ids | Mapping[str, Ids]

Prompt = str | Sequence[int]

_READ = ("input_ids", "attention_mask")
_WITHOUT_MEANING = ("token_type_ids",)  # some tokenizers return it for every model
_CHAT = (
    "chat messages are not a prompt: give them as generate(messages=[…]), which renders them by "
    "the model's chat template, or give the result of tokenizer.apply_chat_template(messages, "
    "add_generation_prompt=True, return_dict=True, return_tensors='pt')"
)


class PromptWarning(UserWarning):
    """Warning about a prompt that is probably not what the user meant; it is served."""


class PromptReader:
    """Reads a model's prompts; warns only once, because all prompts probably share the mistake."""

    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._warned = False

    def read(
        self,
        inputs: Inputs | None,
        input_ids: Ids | None = None,
        attention_mask: Ids | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        """The rows of token ids, without padding; arguments as for `SiriusModel.generate`.

        Raises GenerationError, with the number of the prompt, the reason and the remedy.
        """
        if inputs is not None and input_ids is not None:
            raise GenerationError("inputs and input_ids both name the prompts: give one of them")
        given, ids_only = (inputs, False) if input_ids is None else (input_ids, True)
        if isinstance(given, Mapping):
            given, attention_mask = _of_mapping(given, attention_mask)
            ids_only = True
        rows = _rows(given)
        if not rows:
            raise GenerationError("no prompt was given: give text, token ids, or a batch of them")
        if (ids_only or attention_mask is not None) and any(isinstance(r, str) for r in rows):
            raise GenerationError(
                "text is given as token ids: input_ids and attention_mask are a tokenizer's "
                "output; give text as the first argument, alone"
            )
        if attention_mask is not None:
            rows = _unpadded(rows, attention_mask)
        prompts = []
        for index, row in enumerate(rows):
            if isinstance(row, str):
                row = self._encode(row, index, add_special_tokens)
            prompts.append(row)
        self._check(prompts)
        return prompts

    def _encode(self, text: str, index: int, add_special_tokens: bool) -> list[int]:
        if self._tokenizer is None:
            raise GenerationError("the artifact holds no tokenizer: give token ids, not text")
        if not is_text(text):
            raise GenerationError(
                f"prompt {index} has a lone surrogate, which is not valid text: decode its bytes "
                "as UTF-8"
            )
        with guarded():
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        twice = _doubled(encoding)
        if twice and not self._warned:
            self._warned = True
            warnings.warn(
                f"prompt {index} begins with {' '.join(twice)} already, and the tokenizer adds "
                "another; pass add_special_tokens=False (sirius run: --no-add-special-tokens) for "
                "text that already has its special tokens, such as a rendered chat template",
                PromptWarning,
                stacklevel=5,  # the caller of `generate`, which has a decorator
            )
        return list(encoding.ids)

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        last = self._vocabulary - 1
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise GenerationError(f"prompt {index} is empty: give at least one token")
            if not 0 <= min(prompt) <= max(prompt) <= last:
                wrong = next(token for token in prompt if not 0 <= token <= last)
                raise GenerationError(
                    f"prompt {index} has a token id outside of the vocabulary (0..{last}): "
                    f"{wrong}; encode it with this model's own tokenizer"
                )


def read_ids(given: int | Sequence[int] | Array, name: str) -> list[int]:
    """One token id or several, of any integer type. name: the option's name, for messages.

    Raises GenerationError for values that are not token ids.
    """
    if _is_array(given):
        given = given.tolist()  # type: ignore[union-attr]
    several = _is_nested(given) and not isinstance(given, str)
    items = _sequence(given, name) if several else [given]
    return [_id(item, name) for item in items]


def is_text(text: str) -> bool:
    """Whether a str can be encoded: it holds no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _doubled(encoding: Encoding) -> list[str]:
    """The special tokens that the tokenizer added before a text that begins with the same ones;
    empty if the text does not.
    """
    added = encoding.special_tokens_mask  # 1: added by the tokenizer
    count = next((i for i, of_text in enumerate(added) if not of_text), 0)
    ids = encoding.ids
    return list(encoding.tokens[:count]) if ids[:count] == ids[count : 2 * count] else []


def _of_mapping(given: Mapping[str, Any], mask: Any) -> tuple[Any, Any]:
    """The input_ids and the attention_mask of a tokenizer's output."""
    keys = [str(key) for key in given]
    if "input_ids" not in keys:
        _refuse_messages(given)
        raise GenerationError(
            f"the mapping has no input_ids (its keys: {', '.join(keys) or 'none'}); give what a "
            "tokenizer returns"
        )
    unknown = [key for key in keys if key not in (*_READ, *_WITHOUT_MEANING)]
    if unknown:
        raise GenerationError(
            f"{', '.join(unknown)}: unknown keys of a mapping, which may hold {', '.join(_READ)} "
            f"(and {', '.join(_WITHOUT_MEANING)}, without effect); leave them out"
        )
    own = given.get("attention_mask")
    if own is not None and mask is not None:
        raise GenerationError(
            "attention_mask is given twice: leave out the argument, or the mapping's key"
        )
    return given["input_ids"], mask if own is None else own


def _refuse_messages(given: Mapping[str, Any]) -> None:
    if "role" in given or "messages" in given:
        raise GenerationError(_CHAT)


def _is_array(given: object) -> bool:
    """Whether it is an array or scalar of PyTorch, NumPy, …; tested without importing these."""
    return hasattr(given, "ndim") and hasattr(given, "tolist")


def _is_nested(given: object) -> bool:
    if _is_array(given):
        return bool(given.ndim)  # type: ignore[attr-defined]
    return isinstance(given, Sequence | Mapping)


def _sequence(given: object, name: str) -> Sequence[Any]:
    """`given`, if it is a sequence other than text or bytes; else raises GenerationError."""
    if isinstance(given, Sequence) and not isinstance(given, bytes | bytearray | memoryview | str):
        return given
    raise GenerationError(
        f"{name} is of type {type(given).__name__}; give text, a list of token ids, a NumPy array "
        "or a tensor"
    )


def _rows(given: Any) -> list[str | list[int]]:
    """Each prompt as its text or its ids."""
    if given is None:
        return []
    if isinstance(given, str):
        return [given]
    if _is_array(given):
        return [*_array_rows(given)]
    items = _sequence(given, "the prompt")
    if items and _is_nested(items[0]):
        return [_row(item, f"prompt {index}") for index, item in enumerate(items)]
    return [_ids(items, "prompt 0")] if items else []


def _row(item: Any, name: str) -> str | list[int]:
    """One prompt of several."""
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        _refuse_messages(item)
        raise GenerationError(
            f"{name} is a mapping; give one mapping of the whole batch, as "
            "tokenizer(texts, padding=True) returns it"
        )
    if not _is_array(item):
        return _ids(_sequence(item, name), name)
    if item.ndim != 1:
        raise GenerationError(
            f"{name} is an array of shape {list(item.shape)}; in a list, a prompt has shape [T]"
        )
    return _array_rows(item)[0]


def _array_rows(array: Any) -> list[list[int]]:
    shape = list(array.shape)
    values = array.tolist()
    rows = values if len(shape) == 2 else [values]
    if len(shape) not in (1, 2) or not all(type(token) is int for row in rows for token in row):
        raise GenerationError(
            f"input_ids must be integers of shape [B, T] or [T], got {array.dtype} {shape}; give "
            "what a tokenizer returns"
        )
    return list(rows)


def _ids(items: Sequence[Any], name: str) -> list[int]:
    return [item if type(item) is int else _id(item, name) for item in items]


def _id(item: Any, name: str) -> int:
    """A token id of any integer type, as an int; raises GenerationError for other types."""
    if _is_array(item) and not item.ndim:
        item = item.tolist()
    if isinstance(item, int) and not isinstance(item, bool):
        return operator.index(item)
    if isinstance(item, Mapping):
        _refuse_messages(item)
    if isinstance(item, str):
        fault = f"text ({shown(item)})"
    elif isinstance(item, bool | float):
        fault = f"a {type(item).__name__} ({item})"
    elif _is_nested(item):
        raise GenerationError(
            f"{name} is nested too deep: token ids have shape [T], or [B, T] for a batch"
        )
    else:
        fault = f"a {type(item).__name__}"
    raise GenerationError(
        f"{name} has {fault} instead of token ids; give integers, as a tokenizer returns them"
    )


def _unpadded(rows: list[str | list[int]], mask: Any) -> list[str | list[int]]:
    """The rows of input_ids, without the tokens whose attention_mask is 0."""
    if _is_array(mask):
        mask = mask.tolist()
    kept: list[Any] = list(_sequence(mask, "attention_mask"))
    if not kept or not _is_nested(kept[0]):
        kept = [kept]
    kept = [row.tolist() if _is_array(row) else list(_sequence(row, "its row")) for row in kept]
    sizes = [len(row) for row in rows], [len(row) for row in kept]
    if sizes[0] != sizes[1]:
        raise GenerationError(
            "attention_mask must have the shape of input_ids, whose rows have "
            f"{_listed(sizes[0])} tokens, but its rows have {_listed(sizes[1])}"
        )
    wrong = next((flag for row in kept for flag in row if flag not in (0, 1)), None)
    if wrong is not None:
        raise GenerationError(
            f"attention_mask must be 1 for tokens and 0 for padding, got {wrong!r}; give what a "
            "tokenizer returns"
        )
    return [
        [token for token, keep in zip(*pair, strict=True) if keep]  # type: ignore[misc]
        for pair in zip(rows, kept, strict=True)
    ]


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:8])) + (", …" if len(sizes) > 8 else "")
