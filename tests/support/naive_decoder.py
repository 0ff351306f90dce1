"""Sirius written down a second time, naively: transformers' own model and cache, batch 1.

Shares no code with the runtime. The sparse path is a patched MLP forward; rolling back is cropping
transformers' cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from sirius_runtime.spec import SiteSpec

Path = tuple[int, ...]
"""Tokens from the root on."""


@dataclass
class Sparsity:
    """What the patched MLPs do: nothing while `on` is False."""

    method: str
    sites: tuple[SiteSpec, ...]
    on: bool = False
    record: bool = False
    scores: dict[int, Tensor] = field(default_factory=dict)
    neurons: dict[int, Tensor] = field(default_factory=dict)

    def patch(self, model: LlamaForCausalLM) -> None:
        for index, layer in enumerate(model.model.layers):
            layer.mlp.forward = lambda x, mlp=layer.mlp, index=index: self.forward(mlp, index, x)

    def forward(self, mlp: torch.nn.Module, layer: int, x: Tensor) -> Tensor:
        g = torch.nn.functional.silu(mlp.gate_proj(x))
        u = mlp.up_proj(x)
        if self.record:
            z = (g * u)[0].double()
            z = z / z.norm(dim=-1, keepdim=True)
            self.scores[layer] = z.norm(dim=0)
        if self.on:
            kept = torch.zeros_like(g)
            if self.method == "griffin":
                kept[..., self.neurons[layer]] = 1
            elif self.method == "topk":
                order = g.abs().argsort(dim=-1, descending=True)
                kept.scatter_(-1, order[..., : int(self.sites[layer].kept)], 1)
            else:
                kept[g.abs() > self.sites[layer].threshold] = 1
            g = g * kept
        return mlp.down_proj(g * u)

    def choose(self) -> None:
        kept = int(self.sites[0].kept)
        self.neurons = {i: s.argsort(descending=True)[:kept] for i, s in self.scores.items()}


@dataclass
class Decoder:
    """The model with its cache; `length` tokens are committed, in full K/V."""

    model: LlamaForCausalLM
    sparsity: Sparsity
    cache: DynamicCache = field(init=False)
    length: int = 0

    def __post_init__(self) -> None:
        self.cache = DynamicCache(config=self.model.config)

    def prefill(self, prompt: list[int]) -> int:
        """Commits the prompt and chooses its neurons; returns the first new token."""
        self.sparsity.on, self.sparsity.record = False, True
        logits = self.forward(prompt)
        self.sparsity.record = False
        self.sparsity.choose()
        self.length = len(prompt)
        return int(logits[-1].argmax())

    def forward(self, ids: list[int]) -> Tensor:
        """Logits [T, V] of tokens after all that is in the cache; they stay there."""
        start = self.cache.get_seq_length()
        positions = torch.arange(start, start + len(ids))[None]
        return self.model(
            input_ids=torch.tensor([ids]),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[0]

    def roll_back(self) -> None:
        """Forgets what is not committed."""
        if surplus := self.cache.get_seq_length() - self.length:
            self.cache.crop(-surplus)

    def after(self, path: Path, *, sparse: bool) -> Tensor:
        """Logits [V] after a path of tokens, run by itself; leaves nothing in the cache."""
        self.sparsity.on = sparse
        logits = self.forward(list(path))[-1]
        self.roll_back()
        return logits


class Written(NamedTuple):
    """The new tokens of one prompt, and how many tokens each period committed (also those after
    an EOS token)."""

    tokens: list[int]
    advances: list[int]


@torch.no_grad()
def naive_sirius(
    model: LlamaForCausalLM,
    sparsity: Sparsity,
    prompt: list[int],
    *,
    period: int,
    threshold: float,
    temperature: float,
    max_new_tokens: int,
    eos: set[int],
    rewrite: bool = True,
    whole: bool = False,
) -> Written:
    """One prompt, exactly as SIRIUS' paper describes the chain.

    Without `rewrite`, tokens keep the K/V of the sparse path if it ran them. With `whole`, a
    refused token takes the whole draft with it.
    """
    decoder = Decoder(model, sparsity)
    tokens, advances = [decoder.prefill(prompt)], []
    while len(tokens) < max_new_tokens and tokens[-1] not in eos:
        size = min(period, max_new_tokens - len(tokens))
        chunk = [tokens[-1]]
        sparsity.on = True
        for _ in range(size - 1):
            chunk.append(int(decoder.forward([chunk[-1]])[-1].argmax()))
            if chunk[-1] in eos:
                break
        size = len(chunk)
        sparsity.on = False
        ran = range(decoder.length, decoder.length + size - 1)
        sparse = [
            (layer.keys[:, :, ran], layer.values[:, :, ran]) for layer in decoder.cache.layers
        ]
        decoder.roll_back()
        logits = decoder.forward(chunk)
        if not rewrite:
            for layer, (keys, values) in zip(decoder.cache.layers, sparse, strict=True):
                layer.keys[:, :, ran], layer.values[:, :, ran] = keys, values
        new = []
        for index in range(1, size):
            p = torch.softmax(logits[index - 1] / temperature, -1)[chunk[index]]
            if p < threshold:
                break
            new.append(chunk[index])
        if whole and len(new) < size - 1:
            new = []
        new.append(int(logits[len(new)].argmax()))
        advances.append(len(new))
        tokens += _up_to_eos(new, eos)
        decoder.length = len(prompt) + len(tokens) - 1
        decoder.roll_back()
    return Written(tokens, advances)


@torch.no_grad()
def naive_sirius_tree(
    model: LlamaForCausalLM,
    sparsity: Sparsity,
    prompt: list[int],
    *,
    period: int,
    width: int,
    threshold: float,
    temperature: float,
    max_new_tokens: int,
    eos: set[int],
) -> Written:
    """The same with draft trees, of which every node's path is run by itself, from the root on.

    Only for neurons that one prompt fixes (griffin): elsewhere the beams of a step choose together.
    """
    assert sparsity.method == "griffin"
    decoder = Decoder(model, sparsity)
    tokens, advances = [decoder.prefill(prompt)], []
    while len(tokens) < max_new_tokens and tokens[-1] not in eos:
        size = min(period, max_new_tokens - len(tokens))
        drafted = _beam_search(
            decoder, tokens[-1], size - 1, width, temperature, eos if width == 1 else set()
        )
        kept, correction = _verify(decoder, tokens[-1], drafted, threshold, temperature)
        sparsity.on = False
        decoder.forward(list(kept))
        decoder.length += len(kept)
        advances.append(len(kept))
        tokens += _up_to_eos([*kept[1:], correction], eos)
    return Written(tokens, advances)


def _up_to_eos(tokens: list[int], eos: set[int]) -> list[int]:
    ends = [index for index, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0] + 1] if ends else tokens


def _beam_search(
    decoder: Decoder, root: int, levels: int, width: int, temperature: float, ends: set[int]
) -> dict[Path, float]:
    """Every node of the tree, as the path of tokens to it, and that path's log probability. Nothing
    is drafted after a token of `ends`.
    """
    drafted: dict[Path, float] = {}
    beams: dict[Path, float] = {(root,): 0.0}
    for _ in range(levels):
        grown: dict[Path, float] = {}
        for path, score in beams.items():
            log_p = torch.log_softmax(decoder.after(path, sparse=True).double() / temperature, -1)
            for token in log_p.argsort(descending=True)[:width].tolist():
                grown[*path, token] = score + float(log_p[token])
        best = sorted(grown, key=lambda path: -grown[path])[:width]
        beams = {path: grown[path] for path in best}
        drafted |= beams
        if any(path[-1] in ends for path in beams):
            break
    return drafted


def _verify(
    decoder: Decoder, root: int, drafted: dict[Path, float], threshold: float, temperature: float
) -> tuple[Path, int]:
    """The longest path that passes, the likeliest of those, and the full path's token after it."""
    passing: dict[Path, float] = {(root,): 0.0}
    after = functools.cache(lambda path: decoder.after(path, sparse=False))
    for path, score in drafted.items():  # parents come before their children
        if path[:-1] in passing:
            p = torch.softmax(after(path[:-1]) / temperature, -1)[path[-1]]
            if p >= threshold:
                passing[path] = score
    kept = max(passing, key=lambda path: (len(path), passing[path]))
    return kept, int(after(kept).argmax())
