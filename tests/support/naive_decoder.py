"""Sirius written down a second time, naively: transformers' own model and cache, batch 1.

Shares no code with the runtime. The sparse path is a patched MLP forward; rolling back is cropping
transformers' cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM


@dataclass
class Sparsity:
    """What the patched MLPs do: nothing while `on` is False."""

    method: str
    kept: int
    thresholds: tuple[float, ...] = ()
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
                kept.scatter_(-1, order[..., : self.kept], 1)
            else:
                kept[g.abs() > self.thresholds[layer]] = 1
            g = g * kept
        return mlp.down_proj(g * u)

    def choose(self) -> None:
        self.neurons = {i: s.argsort(descending=True)[: self.kept] for i, s in self.scores.items()}


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
) -> list[int]:
    """The new tokens of one prompt, exactly as SIRIUS' paper describes the chain."""

    def forward(ids: list[int], cache: DynamicCache) -> Tensor:
        start = cache.get_seq_length()
        positions = torch.arange(start, start + len(ids))[None]
        return model(
            input_ids=torch.tensor([ids]),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits[0]

    def crop(cache: DynamicCache, length: int) -> None:
        if surplus := cache.get_seq_length() - length:
            cache.crop(-surplus)

    cache = DynamicCache(config=model.config)
    sparsity.on, sparsity.record = False, True
    tokens = [int(forward(prompt, cache)[-1].argmax())]
    sparsity.record = False
    sparsity.choose()
    while len(tokens) < max_new_tokens and tokens[-1] not in eos:
        committed = len(prompt) + len(tokens) - 1
        size = min(period, max_new_tokens - len(tokens))
        chunk = [tokens[-1]]
        sparsity.on = True
        for _ in range(size - 1):
            chunk.append(int(forward([chunk[-1]], cache)[-1].argmax()))
        sparsity.on = False
        crop(cache, committed)
        logits = forward(chunk, cache)
        for index in range(1, size + 1):
            if index < size:
                p = torch.softmax(logits[index - 1] / temperature, -1)[chunk[index]]
                if p >= threshold:
                    tokens.append(chunk[index])
                    if tokens[-1] in eos:
                        return tokens
                    continue
            tokens.append(int(logits[index - 1].argmax()))
            break
        crop(cache, len(prompt) + len(tokens) - 1)
    return tokens
