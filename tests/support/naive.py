"""What the `sirius::` operators mean, as loops over rows, heads, tokens and neurons in float64.

Each function is named as its operator, or takes what defines the result (a tree's parents, a row's
history) in place of what the operator is given (a mask, slots of a cache).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: (
        0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    ),
    "quick_gelu": lambda v: v / (1 + math.exp(-1.702 * v)),
    "relu": lambda v: max(v, 0.0),
    "relu2": lambda v: max(v, 0.0) ** 2,
}

Choice = Callable[[int, list[list[float]]], Iterable[int]]
"""The neurons that the tokens of a row (its index) may use, given the activations of each."""


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def linear(x: list[float], weight: Tensor, bias: Tensor | None) -> list[float]:
    rows: list[list[float]] = weight.double().tolist()
    offsets = [0.0] * len(rows) if bias is None else bias.double().tolist()
    return [dot(row, x) + offset for row, offset in zip(rows, offsets, strict=True)]


# attention


def ancestors(parents: Sequence[int], node: int) -> list[int]:
    """`node`, its parent, and so on up to the root; a root's parent is -1."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path


def tree_mask(parents: Sequence[int]) -> Tensor:
    """[N, N]: how far up the tree a node's ancestor is, -1 for a node that is none."""
    mask = torch.full((len(parents), len(parents)), -1)
    for node in range(len(parents)):
        for distance, ancestor in enumerate(ancestors(parents, node)):
            mask[node, ancestor] = distance
    return mask


def tree_attention(
    q_HND: Tensor,
    k_GND: Tensor,
    v_GND: Tensor,
    history_k_GLD: Tensor,
    history_v_GLD: Tensor,
    parents: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One row: each node of a tree sees the history, its ancestors and itself; [H, N, Dv]."""
    (heads, nodes, _), length = q_HND.shape, history_k_GLD.shape[1]
    shared = heads // k_GND.shape[0]
    rows = []
    for head in range(heads):
        q, k, v, history_k, history_v = (
            tensor.double().tolist()
            for tensor in (
                q_HND[head],
                k_GND[head // shared],
                v_GND[head // shared],
                history_k_GLD[head // shared],
                history_v_GLD[head // shared],
            )
        )
        for node in range(nodes):
            path = ancestors(parents, node)
            position = length + len(path) - 1
            seen = [(i, history_k[i], history_v[i]) for i in range(length)]
            seen += [(position - up, k[other], v[other]) for up, other in enumerate(path)]
            if window is not None:
                seen = [entry for entry in seen if position - entry[0] < window]
            scores = [dot(q[node], key) * scale for _, key, _ in seen]
            if softcap is not None:
                scores = [softcap * math.tanh(score / softcap) for score in scores]
            values = [value for _, _, value in seen]
            if sinks is not None:  # a token that every query sees, and that has no value
                scores.append(sinks.double().tolist()[head])
                values.append([0.0] * v_GND.shape[2])
            rows.append(_mix(scores, values))
    return torch.tensor(rows).unflatten(0, (heads, nodes)).to(q_HND.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *kind: Any) -> Tensor:
    """A tree without branches, after no history. kind: window, softcap and sinks."""
    chain = list(range(-1, q.shape[2] - 1))
    rows = [
        tree_attention(q[b], k[b], v[b], k[b, :, :0], v[b, :, :0], chain, scale, *kind)
        for b in range(q.shape[0])
    ]
    return torch.stack(rows)


def _mix(scores: list[float], values: list[list[float]]) -> list[float]:
    exponentials = [math.exp(score - max(scores)) for score in scores]
    shares = [e / math.fsum(exponentials) for e in exponentials]
    return [dot(shares, column) for column in zip(*values, strict=True)]


# MLPs and linears; arguments as the operators take them


def _neurons(
    x: list[float],
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    act: str,
) -> tuple[list[float], list[float]]:
    """Of one token: act(gate x), and act(gate x) · up x."""
    g = [ACTIVATIONS[act](v) for v in linear(x, gate, gate_bias)]
    if up is None:
        return g, g
    return g, [a * b for a, b in zip(g, linear(x, up, up_bias), strict=True)]


def _mlp(
    x_BTC: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    choice: Choice,
) -> Tensor:
    rows = down.double().tolist()
    result = torch.zeros_like(x_BTC)
    for b, tokens in enumerate(x_BTC.double().tolist()):
        neurons = [_neurons(x, gate, up, gate_bias, up_bias, act) for x in tokens]
        chosen = list(choice(b, [g for g, _ in neurons]))
        for t, (_, z) in enumerate(neurons):
            y = [0.0] * len(tokens[t]) if down_bias is None else down_bias.double().tolist()
            for i in chosen:
                y = [total + z[i] * d for total, d in zip(y, rows[i], strict=True)]
            result[b, t] = torch.tensor(y)
    return result


def dense_mlp(*args: Any) -> Tensor:
    *tensors, act, _layer = args
    return _mlp(*tensors, act, lambda row, gs: range(len(gs[0])))


def dense_mlp_activity(*args: Any) -> tuple[Tensor, Tensor]:
    x, gate, up, _, gate_bias, up_bias, _, act, _layer = args
    activity = torch.zeros(*x.shape[:2], gate.shape[0])
    for b, tokens in enumerate(x.double().tolist()):
        for t, token in enumerate(tokens):
            _, z = _neurons(token, gate, up, gate_bias, up_bias, act)
            norm = math.sqrt(dot(z, z))
            activity[b, t] = torch.tensor([(value / norm) ** 2 for value in z])
    return dense_mlp(*args), activity


def dense_mlp_statistic(*args: Any) -> tuple[Tensor, Tensor]:
    *dense, valid = args
    y, activity = dense_mlp_activity(*dense)
    statistic = torch.zeros(activity.shape[0], activity.shape[2])
    for b, tokens in enumerate(valid.tolist()):
        for t, counts in enumerate(tokens):
            if counts:
                statistic[b] += activity[b, t]
    return y, statistic


def scores(gs: list[list[float]]) -> list[float]:
    """How much each neuron matters to the tokens of a row together."""
    return [math.fsum(abs(g[i]) for g in gs) for i in range(len(gs[0]))]


def topk_mlp(*args: Any) -> Tensor:
    *tensors, act, _layer, keep = args

    def largest(row: int, gs: list[list[float]]) -> list[int]:
        score = scores(gs)
        return sorted(range(len(score)), key=lambda i: -score[i])[:keep]

    return _mlp(*tensors, act, largest)


def cats_mlp(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, act, _layer, threshold = args
    counts: list[int] = []

    def above(row: int, gs: list[list[float]]) -> list[int]:
        kept = [i for i, score in enumerate(scores(gs)) if score / len(gs) > threshold]
        counts.append(len(kept))
        return kept

    return _mlp(*tensors, act, above), torch.tensor(counts)


def griffin_mlp(*args: Any) -> Tensor:
    *tensors, act, layer, neurons = args
    chosen = neurons[layer].tolist()
    return _mlp(*tensors, act, lambda row, gs: chosen[row])


def griffin_cats_mlp(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, act, layer, neurons, threshold = args
    counts: list[int] = []

    def above(row: int, gs: list[list[float]]) -> list[int]:
        score = scores(gs)
        kept = [i for i in neurons[layer, row].tolist() if score[i] / len(gs) > threshold]
        counts.append(len(kept))
        return kept

    return _mlp(*tensors, act, above), torch.tensor(counts)


def sparse_linear(
    x_BTC: Tensor, weight: Tensor, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    result, counts = x_BTC.new_zeros(*x_BTC.shape[:2], weight.shape[1]), []
    for b, tokens in enumerate(x_BTC.double().tolist()):
        means = [
            math.fsum(map(abs, channel)) / len(tokens) for channel in zip(*tokens, strict=True)
        ]
        kept = [i for i, mean in enumerate(means) if mean > threshold]
        counts.append(len(kept))
        for t, x in enumerate(tokens):
            only = [value if i in kept else 0.0 for i, value in enumerate(x)]
            result[b, t] = torch.tensor(linear(only, weight.t(), bias))
    return result, torch.tensor(counts)


# mixtures of experts

EXPERT_ACTIVATIONS: dict[str, Callable[[float], float]] = {
    **ACTIVATIONS,
    "clamped_swiglu": lambda v: min(v, 7.0) / (1 + math.exp(-1.702 * min(v, 7.0))),
}


def _expert(
    x: list[float], expert: int, moe: Sequence[Any], act: str
) -> tuple[list[float], Callable[[Iterable[int]], list[float]]]:
    """Of one token and one of its experts: act(gate x), and the output of some of its neurons."""
    gate, up, down, gate_bias, up_bias, down_bias = (
        None if tensor is None else tensor[expert] for tensor in moe
    )
    g = [EXPERT_ACTIVATIONS[act](v) for v in linear(x, gate, gate_bias)]
    z = list(g)
    if up is not None:
        u = linear(x, up, up_bias)
        if act == "clamped_swiglu":
            u = [max(-7.0, min(7.0, v)) + 1 for v in u]
        z = [a * b for a, b in zip(g, u, strict=True)]

    def output(neurons: Iterable[int]) -> list[float]:
        only = set(neurons)
        kept = [value if i in only else 0.0 for i, value in enumerate(z)]
        return linear(kept, down.t(), down_bias)

    return g, output


def topk_moe(*args: Any) -> Tensor:
    x_NC, experts, weights, *moe, act, _layer, keep = args
    result = torch.zeros_like(x_NC)
    for n, x in enumerate(x_NC.double().tolist()):
        shares: list[float] = weights[n].double().tolist()
        parts = [_expert(x, e, moe, act) for e in experts[n].tolist()]
        ranked = sorted(
            (
                (abs(v) * share, slot, i)
                for slot, (share, (g, _)) in enumerate(zip(shares, parts, strict=True))
                for i, v in enumerate(g)
            ),
            reverse=True,
        )[:keep]
        total = [0.0] * len(x)
        for slot, (share, (_, output)) in enumerate(zip(shares, parts, strict=True)):
            y = output([i for _, of, i in ranked if of == slot])
            total = [t + share * v for t, v in zip(total, y, strict=True)]
        result[n] = torch.tensor(total)
    return result


def dense_moe(*args: Any) -> Tensor:
    gate, experts = args[3], args[1]
    return topk_moe(*args, gate.shape[1] * experts.shape[1])


def experts_moe(*args: Any) -> Tensor:
    x, experts, weights, *moe, keep, normalised = args
    best, shares = [], []
    for chosen, given in zip(experts.tolist(), weights.double().tolist(), strict=True):
        ranked = sorted(zip(given, chosen, strict=True), reverse=True)[:keep]
        scale = math.fsum(given) / math.fsum(w for w, _ in ranked) if normalised else 1.0
        best.append([e for _, e in ranked])
        shares.append([w * scale for w, _ in ranked])
    return dense_moe(x, torch.tensor(best), torch.tensor(shares), *moe)
