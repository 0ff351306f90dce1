"""Calibration text that the model writes, with the full path's K/V and logits for it.

When decoding, a model reads its own text. So the built-in calibration text is on-policy: the
model's greedy continuations of prompts. The text is decoded as in the runtime. Its K/V and logits
are kept, so that later measurements need not compute them again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sirius_compile.texts import LEAST_TOKENS, Sample, batches, hold_out, padded
from sirius_compile.tokenwise import Caches, History, Look, Tokenwise
from sirius_compile.watch import Watch, unwatched
from sirius_runtime.entries import FULL
from sirius_runtime.policy import likeliest
from sirius_runtime.tensor_state import TensorState

CONTINUATION = 48  # new tokens after each prompt
LARGE = 1_000_000_000
"""Parameters above which a model writes less text: a token of each prompt takes half a second."""
SHORT = 32  # new tokens after each prompt, for such a model
FEW, FEW_HELD = 12, 8  # prompts that such a model continues: to calibrate, or only to measure
ALIKE = 4  # prompts that are read in one call


@dataclass(frozen=True)
class Text:
    """Samples, and the full path's results for them if it has run them; row r is sample r.

    `caches`: the K/V. `logits` [R, T, V]: from the end of each prompt on. `statistic` [layers, R,
    I]: by which a method selects neurons for the prompts, if the program that ran them has it.
    """

    samples: tuple[Sample, ...]
    caches: Caches | None = None
    logits: Tensor | None = None
    statistic: Tensor | None = None

    def __len__(self) -> int:
        """The number of tokens."""
        return sum(map(len, self.samples))

    def after(
        self, rows: Sequence[int], starts: Sequence[int], tokens: int
    ) -> tuple[Tensor, History]:
        """The `tokens` tokens [N, tokens] from each row's start on, and the history before them."""
        assert self.caches is not None
        ids = padded(
            [
                (*self.samples[row].tokens[start : start + tokens], *[0] * tokens)[:tokens]
                for row, start in zip(rows, starts, strict=True)
            ]
        )
        return ids, self.caches.after(rows, starts, tokens)

    def prompts(self, rows: Sequence[int]) -> list[tuple[int, ...]]:
        return [self.samples[row].tokens[: self.samples[row].prompt] for row in rows]

    def neurons_for(self, path: Tokenwise, rows: Sequence[int]) -> Tensor | None:
        """The neurons of these rows' prompts; None if the method does not select by prompt."""
        if self.statistic is None or not path.spec.sparsity.method.per_prompt:
            return path.neurons(self.prompts(rows))
        return path.select(self.statistic[:, torch.tensor(rows)])

    def parts(self) -> list[list[int]]:
        """Groups of rows, each for one call of `observe`."""
        if self.caches is None:
            return batches([len(sample) for sample in self.samples])
        return batches([len(sample) - sample.prompt for sample in self.samples])


def observe(path: Tokenwise, text: Text, rows: Sequence[int], look: Look) -> None:
    """Calls `look` with each site's scores [tokens, units] for tokens of these rows.

    Only tokens after the prompt count if the K/V is known, or if the prompt selects the neurons;
    else all tokens count.
    """
    samples = [text.samples[row] for row in rows]
    neurons = text.neurons_for(path, rows)
    history = None
    if text.caches is None:
        ids = padded([sample.tokens for sample in samples])
        first = [0 if neurons is None else min(s.prompt, len(s) - 1) for s in samples]
        ends = [len(sample) for sample in samples]
    else:
        ends = [len(sample) - sample.prompt for sample in samples]
        ids, history = text.after(rows, [sample.prompt for sample in samples], max(ends))
        first = [0] * len(rows)
    index = torch.arange(ids.shape[1])
    shown = (index >= torch.tensor(first)[:, None]) & (index < torch.tensor(ends)[:, None])
    shown = shown.to(path.device)
    path.observe(ids, neurons, lambda site, scores: look(site, scores[shown]), history)


@torch.inference_mode()
def write(
    path: Tokenwise,
    prompts: Sequence[Sequence[int]],
    watch: Watch = unwatched,
    *,
    held_only: bool = False,
    every: int | None = None,
    new_tokens: int | None = None,
) -> tuple[Text, Text]:
    """Greedy continuations of the prompts by the full path: the calibration text, and the held-out
    text with its logits.

    `every`: which prompts are held out, by default every fourth, or every third for a large model.
    `held_only`: hold out all prompts, because nothing is calibrated. `new_tokens`: after each
    prompt, by default `CONTINUATION`. A large model continues only the shortest prompts, by default
    by `SHORT` tokens.
    """
    model = path.spec.model
    large = model.parameters > LARGE
    if large:
        prompts = _shortest(prompts, FEW_HELD if held_only else FEW)
    every = every or (3 if large else 4)
    new_tokens = new_tokens or (SHORT if large else CONTINUATION)
    held = list(prompts[every - 1 :: every])
    used = [p for i, p in enumerate(prompts) if i % every < every - 1]
    if held_only:
        held, used = list(prompts), []
    new_tokens = max(1, min(new_tokens, model.max_seq_len // 2))
    given = [tuple(prompt[: model.max_seq_len - new_tokens]) for prompt in (*used, *held)]
    state = TensorState(path.backend, len(given), max(map(len, given)) + new_tokens)
    logits, tokens = list[Tensor](), list[Tensor]()
    with watch.count("write text", new_tokens) as done:
        for step in range(new_tokens):
            new = state.step(FULL)["logits"][:, 0] if step else _prefill(state, given)
            logits.append(new[len(used) :].clone())
            tokens.append(likeliest(new))
            state.commit(int(step > 0), tokens[-1])
            done()
    ends = set(path.spec.eos_token_ids)
    samples = [
        Sample((*prompt, *_until(new, ends)), len(prompt))
        for prompt, new in zip(given, torch.stack(tokens, 1).tolist(), strict=True)
    ]
    decoded = sum(len(sample) - sample.prompt for sample in samples[: len(used)])
    if not held_only and (not held or decoded < LEAST_TOKENS):  # calibrate on the prompts, too
        first, rest = hold_out(samples)
        return Text(tuple(first)), Text(tuple(rest))
    caches, statistic = Caches(state.k_cache, state.v_cache), state.statistic

    def part(first: int, end: int, logits: Tensor | None) -> Text:
        of_rows = None if statistic is None else statistic[:, first:end]
        return Text(tuple(samples[first:end]), caches.rows(first, end), logits, of_rows)

    return part(0, len(used), None), part(len(used), len(given), torch.stack(logits, 1))


def _prefill(state: TensorState, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The logits after each prompt [R, V]. Prompts of similar length run together, because each is
    padded to the longest of its call.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    parts, logits = list[TensorState](), list[Tensor]()
    for first in range(0, len(order), ALIKE):
        rows = order[first : first + ALIKE]
        parts.append(state.part(first, first + len(rows)))
        logits.append(parts[-1].prefill([prompts[row] for row in rows])[0])
    state.length = torch.cat([part.length for part in parts])
    statistics = [part.statistic for part in parts if part.statistic is not None]
    state.statistic = torch.cat(statistics, 1) if statistics else None
    back = [order.index(row) for row in range(len(order))]
    state.select(back)
    return torch.cat(logits)[back]


def _shortest(prompts: Sequence[Sequence[int]], most: int) -> list[Sequence[int]]:
    """The `most` shortest prompts, in their order. (A batch is padded to its longest prompt.)"""
    chosen = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))[:most]
    return [prompts[i] for i in sorted(chosen)]


def _until(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """The tokens up to and including the first end token."""
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: last + 1])


def run(path: Tokenwise, text: Text) -> Iterator[Text]:
    """Yields the text in parts, each with its K/V and logits."""
    if text.logits is not None:
        yield text
        return
    for rows in batches([len(sample) for sample in text.samples]):
        samples = tuple(text.samples[row] for row in rows)
        logits, caches = path.read(padded([sample.tokens for sample in samples]))
        first = torch.tensor([sample.prompt - 1 for sample in samples])[:, None]
        places = first + torch.arange(logits.shape[1] - int(first.min()))
        row = torch.arange(len(samples))[:, None]
        logits = logits[row, places.clamp(max=logits.shape[1] - 1)]
        statistic = path.statistic([sample.tokens[: sample.prompt] for sample in samples])
        yield Text(samples, caches, logits, statistic)
