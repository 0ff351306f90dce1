"""Which layers to keep dense: those whose sparsity costs most agreement with the full path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sirius_compile.texts import Sample
from sirius_compile.tokenwise import Tokenwise

SAMPLES = 8  # texts that agreement is measured on, at the most


@dataclass(frozen=True)
class LayerAgreement:
    """Agreement with the full path where this layer alone is sparse: the overlap of both paths'
    next-token distributions, the mean over tokens, which is how likely lossless sampling accepts a
    drafted token (arXiv 2211.17192, theorem 3.5). 1: nothing is lost.
    """

    layer: int
    agreement: float


def rank_layers(
    layers: int, sparse_alone: Callable[[int], Tokenwise], samples: Sequence[Sample]
) -> tuple[LayerAgreement, ...]:
    """Every layer, the costliest first. `sparse_alone`: a program that is sparse in that layer
    only.
    """
    found = []
    for layer in range(layers):
        path = sparse_alone(layer)
        values = [_overlap(path, sample) for sample in samples[:SAMPLES]]
        found.append(LayerAgreement(layer, float(torch.cat(values).mean())))
    return tuple(sorted(found, key=lambda one: (one.agreement, one.layer)))


def _overlap(path: Tokenwise, sample: Sample) -> torch.Tensor:
    """Overlap [tokens] after each token that was not the prompt's."""
    ids = torch.tensor([sample.tokens])
    first = min(sample.prompt, len(sample) - 1)
    full = path.full(ids)[0, first:].float().softmax(-1)
    sparse = path.sparse(ids, path.neurons(ids[:, : sample.prompt]))[0, first:].float().softmax(-1)
    return torch.minimum(full, sparse).sum(-1)
