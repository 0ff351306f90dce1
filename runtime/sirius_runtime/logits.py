"""Logits processors: transformers' generation options, for all nodes of a tree at once; and the
log-probabilities that a run reports.

For each sequence, a processor gives bit for bit what transformers' processor of the same option
gives, in float32; they apply in transformers' order. They are pure tensor functions without host
reads, except for the user's callables. Shape letters: `R` sequences (rows, or nodes of trees), `T`
tokens, `V` vocabulary; the others are those of `sirius_runtime.policy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sirius_runtime.errors import GenerationError
from sirius_runtime.logits_options import (
    LogitsProcessor,
    LogitsSpec,
    SequenceBias,
    TokenLogprobs,
)
from sirius_runtime.policy import Verdict
from sirius_runtime.tree import Tree


class History(NamedTuple):
    """Token sequences, padded on the right: `tokens` [R, T], their `lengths` [R], and the lengths
    of their prompts, `prompts` [R]. All int64.
    """

    tokens: Tensor
    lengths: Tensor
    prompts: Tensor


Processor = Callable[[Tensor, History], Tensor]
"""Maps logits [R, V] float32, and the sequences before them, to processed logits [R, V]."""


class Logprobs(NamedTuple):
    """Log-probabilities of a period's tokens. `tokens` [B, K], of which the first `advance` [B]
    count; `chosen` [B, K] float32: their log-probabilities. `ids` [B, K, n] int64 and `values`
    [B, K, n]: the n likeliest tokens at each place and their log-probabilities, best first.
    """

    tokens: Tensor
    advance: Tensor
    chosen: Tensor
    values: Tensor
    ids: Tensor


def node_histories(history: History, tree: Tree, nodes: Tensor) -> History:
    """The sequence that ends with each of `nodes` [n] of every row's tree: B * n sequences.

    `history` has the B committed sequences; the last token of each is the tree's root.
    """
    S = history.tokens.shape[1]
    last = history.lengths[:, None] - 1
    above = tree.mask.index_select(1, nodes)  # [B, n, N]
    # Scatters a path's tokens to their places; tokens off the path go to an extra last column.
    places = torch.where(above >= 0, (last + tree.depth.clamp(min=0))[:, None], S)
    tokens = torch.nn.functional.pad(history.tokens, (0, 1))[:, None].repeat(1, len(nodes), 1)
    tokens = tokens.scatter(2, places, tree.tokens[:, None].expand_as(places))[:, :, :S]
    lengths = last + 1 + tree.depth.index_select(1, nodes).clamp(min=0)
    prompts = history.prompts[:, None].expand_as(lengths)
    return History(tokens.flatten(0, 1), lengths.flatten(), prompts.flatten())


def verdict_logprobs(logits_BNV: Tensor, verdict: Verdict, count: int) -> Logprobs:
    """The log-probabilities of a period's tokens, and of the `count` likeliest tokens at each
    place, from the logits after each node: token i follows the i-th node of the kept path.
    """
    index = verdict.nodes[:, :, None].expand(-1, -1, logits_BNV.shape[2])
    log_p = logits_BNV.float().gather(1, index).log_softmax(-1)
    tokens = verdict.tokens.clamp(min=0)  # NO_TOKEN is -1; its value is never reported
    chosen, best = log_p.gather(2, tokens[:, :, None])[..., 0], log_p.topk(count, -1)
    return Logprobs(verdict.tokens, verdict.advance, chosen, best.values, best.indices)


def step_logprobs(logits_BV: Tensor, token_B: Tensor, count: int) -> Logprobs:
    """As `verdict_logprobs`, for one token per row."""
    root = torch.zeros_like(token_B)[:, None]
    only = Verdict(token_B[:, None], torch.ones_like(token_B), token_B, root)
    return verdict_logprobs(logits_BV[:, None], only, count)


def read_logprobs(found: Logprobs) -> list[list[TokenLogprobs]]:
    """Each row's log-probabilities as Python numbers."""
    values, ids = found.values.tolist(), found.ids.tolist()
    tokens, chosen = found.tokens.tolist(), found.chosen.tolist()
    return [
        [
            TokenLogprobs(
                tokens[row][i], chosen[row][i], tuple(zip(ids[row][i], values[row][i], strict=True))
            )
            for i in range(count)
        ]
        for row, count in enumerate(found.advance.tolist())
    ]


def processors(
    spec: LogitsSpec,
    own: Sequence[LogitsProcessor],
    *,
    eos: frozenset[int],
    max_new_tokens: int,
    vocabulary: int,
    device: torch.device,
) -> list[Processor]:
    """The processors of `spec`, in transformers' order, then the user's (`own`)."""
    ends = torch.tensor(sorted(t for t in eos if t < vocabulary), dtype=torch.int64, device=device)
    found: list[Processor] = []
    if spec.sequence_bias:
        found.append(_sequence_bias(spec.sequence_bias, vocabulary, device))
    if spec.encoder_repetition_penalty != 1.0:
        found.append(_repetition(1 / spec.encoder_repetition_penalty, prompt_alone=True))
    if spec.repetition_penalty != 1.0:
        found.append(_repetition(spec.repetition_penalty, prompt_alone=False))
    if spec.no_repeat_ngram_size:
        found.append(_no_repeat(spec.no_repeat_ngram_size, prompt_alone=False))
    if spec.encoder_no_repeat_ngram_size:
        found.append(_no_repeat(spec.encoder_no_repeat_ngram_size, prompt_alone=True))
    if forbidden := [t for t in spec.bad_words_ids if not (len(t) == 1 and t[0] in eos)]:
        biases = [SequenceBias(tokens, -math.inf) for tokens in dict.fromkeys(forbidden)]
        found.append(_sequence_bias(biases, vocabulary, device))
    if len(ends):
        found += _least_length(spec, _mask(ends, vocabulary))
    if spec.forced_bos_token_id is not None:
        found.append(
            _forced([spec.forced_bos_token_id], vocabulary, device, lambda h: h.lengths == 1)
        )
    if spec.forced_eos_token_id:
        found.append(
            _forced(
                spec.forced_eos_token_id,
                vocabulary,
                device,
                lambda h: h.lengths == h.prompts + (max_new_tokens - 1),
            )
        )
    if spec.remove_invalid_values:
        found.append(_remove_invalid)
    if spec.exponential_decay_length_penalty is not None and len(ends):
        found.append(_decay(*spec.exponential_decay_length_penalty, ends, max_new_tokens))
    if spec.suppress_tokens:
        mask = _mask(torch.tensor(spec.suppress_tokens, device=device), vocabulary)
        found.append(lambda scores, history: scores.masked_fill(mask, -math.inf))
    if spec.begin_suppress_tokens:
        found.append(_suppress_first(spec, vocabulary, device))
    found += [_called(processor) for processor in own]
    if spec.renormalize_logits:
        found.append(lambda scores, history: scores.log_softmax(-1))
    return found


def _sequence_bias(
    biases: Sequence[SequenceBias], vocabulary: int, device: torch.device
) -> Processor:
    """Adds a bias to the logit of a token that would complete a biased sequence."""
    alone = torch.zeros(vocabulary, dtype=torch.float32, device=device)
    for entry in biases:
        if len(entry.tokens) == 1:
            alone[entry.tokens[0]] = entry.bias
    # In groups of one length, as transformers adds them: sums of floats depend on the order.
    longer: dict[int, list[SequenceBias]] = {}
    for entry in biases:
        if len(entry.tokens) > 1:
            longer.setdefault(len(entry.tokens), []).append(entry)
    groups = [
        (
            torch.tensor([entry.tokens[:-1] for entry in group], device=device),
            torch.tensor([entry.tokens[-1] for entry in group], device=device),
            torch.tensor([entry.bias for entry in group], dtype=torch.float32, device=device),
        )
        for group in longer.values()
    ]

    def process(scores: Tensor, history: History) -> Tensor:
        bias = torch.zeros_like(scores) + alone
        for before, last, value in groups:
            found = (_last(history, before.shape[1])[:, None] == before).all(-1)
            found &= (history.lengths >= before.shape[1])[:, None]
            bias = bias.index_add(1, last, torch.where(found, value, 0.0))
        return scores + bias

    return process


def _repetition(penalty: float, *, prompt_alone: bool) -> Processor:
    """For tokens of the sequence, divides positive logits by `penalty` and multiplies negative
    ones.
    """

    def process(scores: Tensor, history: History) -> Tensor:
        end = history.prompts if prompt_alone else history.lengths
        there = torch.arange(history.tokens.shape[1], device=scores.device) < end[:, None]
        seen = _marked(history.tokens, there, scores.shape[1])
        return torch.where(
            seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores
        )

    return process


def _no_repeat(size: int, *, prompt_alone: bool) -> Processor:
    """Forbids a token that would repeat an n-gram of `size` tokens of the sequence."""

    def process(scores: Tensor, history: History) -> Tensor:
        if history.tokens.shape[1] < size:
            return scores
        runs = history.tokens.unfold(1, size, 1)  # [R, T - size + 1, size]
        end = history.prompts if prompt_alone else history.lengths
        begun = torch.arange(size, size + runs.shape[1], device=scores.device)
        same = begun <= end[:, None]
        same &= (runs[..., :-1] == _last(history, size - 1)[:, None]).all(-1)
        same &= (history.lengths >= size - 1)[:, None]
        return scores.masked_fill(_marked(runs[..., -1], same, scores.shape[1]), -math.inf)

    return process


def _least_length(spec: LogitsSpec, ends_V: Tensor) -> list[Processor]:
    """Forbids EOS in sequences that are shorter than the minimum length."""
    new, length = spec.min_new_tokens, spec.min_length

    def process(scores: Tensor, history: History) -> Tensor:
        short = history.lengths < (length if new is None else history.prompts + new)
        return scores.masked_fill(short[:, None] & ends_V, -math.inf)

    return [process] if (length if new is None else new) else []


def _forced(
    tokens: Sequence[int],
    vocabulary: int,
    device: torch.device,
    where: Callable[[History], Tensor],
) -> Processor:
    """Allows only these tokens, equally likely, in the sequences that `where` [R] marks."""
    forced = torch.full((vocabulary,), -math.inf, device=device)
    forced[list(tokens)] = 0.0

    def process(scores: Tensor, history: History) -> Tensor:
        return torch.where(where(history)[:, None], forced, scores)

    return process


def _remove_invalid(scores: Tensor, history: History) -> Tensor:
    """NaN becomes 0; an infinity becomes the largest finite number of its sign."""
    return scores.nan_to_num(0.0)


def _decay(start: int, factor: float, ends: Tensor, max_new_tokens: int) -> Processor:
    """Raises the EOS logits by a factor that grows with each token after the first `start`."""
    # Python's power, as in transformers: a tensor's `pow` may differ in the last bit.
    growth = [_power(factor, count) - 1 for count in range(max_new_tokens + 1)]
    growths = torch.tensor(growth, dtype=torch.float64, device=ends.device).float()

    def process(scores: Tensor, history: History) -> Tensor:
        beyond = (history.lengths - history.prompts - start).clamp(0, max_new_tokens)
        own = scores.index_select(1, ends)
        more = own.abs() * growths[beyond][:, None]
        return scores.index_add(1, ends, more.masked_fill(~own.isfinite(), 0.0))

    return process


def _power(base: float, exponent: int) -> float:
    try:
        return float(base**exponent)
    except OverflowError:
        return math.inf


def _suppress_first(spec: LogitsSpec, vocabulary: int, device: torch.device) -> Processor:
    """Forbids tokens at the start of the answer; after a forced BOS, as its second token."""
    mask = _mask(torch.tensor(spec.begin_suppress_tokens, device=device), vocabulary)
    is_forced = spec.forced_bos_token_id is not None

    def process(scores: Tensor, history: History) -> Tensor:
        begin = history.prompts + ((history.prompts <= 1) & is_forced)
        return scores.masked_fill((history.lengths == begin)[:, None] & mask, -math.inf)

    return process


def _called(processor: LogitsProcessor) -> Processor:
    """Calls a user's processor once for all sequences of one length, so that it sees no padding.

    This reads the lengths from the device. Raises GenerationError for a result of another shape.
    """

    def process(scores: Tensor, history: History) -> Tensor:
        scores = scores.clone()
        lengths = history.lengths.tolist()
        for length in sorted(set(lengths)):
            rows = [row for row, own in enumerate(lengths) if own == length]
            given = scores[rows]
            result = processor(history.tokens[rows, :length], given.clone())
            if not isinstance(result, Tensor) or result.shape != given.shape:
                found = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise GenerationError(
                    f"a logits_processor must return scores of shape {list(given.shape)}, as it "
                    f"was given, got {found}"
                )
            scores[rows] = result.to(scores)
        return scores

    return process


def _last(history: History, count: int) -> Tensor:
    """The last `count` tokens [R, count] of each sequence; undefined for shorter sequences."""
    index = history.lengths[:, None] - count + torch.arange(count, device=history.tokens.device)
    return history.tokens.gather(1, index.clamp(min=0))


def _mask(tokens: Tensor, vocabulary: int) -> Tensor:
    """Whether each token of the vocabulary is in `tokens`: bool [V]."""
    return torch.zeros(vocabulary, dtype=torch.bool, device=tokens.device).index_fill(
        0, tokens, True
    )


def _marked(tokens_RT: Tensor, where_RT: Tensor, vocabulary: int) -> Tensor:
    """Whether each token of the vocabulary is in a sequence at a place where `where_RT` is true:
    bool [R, V].
    """
    marked = tokens_RT.new_zeros(len(tokens_RT), vocabulary + 1, dtype=torch.bool)
    return marked.scatter(1, torch.where(where_RT, tokens_RT, vocabulary), True)[:, :vocabulary]
