"""The text model of a multimodal model: its config, and the names of its weights.

A multimodal checkpoint stores its text model under a prefix that differs between families
(``language_model.model.``, ``model.language_model.``, …). It is found by the names after it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

_OF_THE_WHOLE = ("dtype", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id")


def text_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """The config of a multimodal model's text model, completed with values that only the whole
    model's config has; None for a text-only model.
    """
    inner = getattr(config, "text_config", None)
    if not isinstance(inner, PretrainedConfig):
        return None
    text = copy.deepcopy(inner)
    for key in _OF_THE_WHOLE:
        value = getattr(config, key, None)
        if value is not None and getattr(text, key, None) is None:
            setattr(text, key, value)
    # The head belongs to the whole model, so the whole model's config decides whether it is tied.
    text.tie_word_embeddings = config.tie_word_embeddings
    return text


def is_causal(config: PretrainedConfig) -> bool:
    """Whether transformers has a causal language model for a config."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def text_names(
    stored: Iterable[str], wanted: Collection[str], base: str
) -> tuple[dict[str, str], str | None]:
    """The text model's tensors among the stored ones: stored name → name in the text model.

    `wanted`: the names of the text model's weights. `base`: the prefix of all of these except the
    head's. Also returns the checkpoint's prefix in place of `base`; None if there is none.
    """
    by_end = _by_end(stored)
    inner = {name: name.removeprefix(f"{base}.") for name in wanted}
    prefixes = Counter(
        found.removesuffix(end)
        for name, end in inner.items()
        if end != name
        for found in by_end.get(end, ())
    )
    if not prefixes:
        return {}, None
    ((prefix, _), *_) = prefixes.most_common(1)
    stored_names = {name for names in by_end.values() for name in names}
    named = {f"{prefix}{end}": name for name, end in inner.items() if end != name}
    found = {there: name for there, name in named.items() if there in stored_names}
    for name, end in inner.items():
        if end == name and len(by_end.get(name, ())) == 1:  # the head, which is not under `base`
            found[by_end[name][0]] = name
    return found, prefix


def _by_end(names: Iterable[str]) -> Mapping[str, list[str]]:
    """Names by each suffix that begins after a dot, and by the whole name."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            found.setdefault(".".join(parts[start:]), []).append(name)
    return found
