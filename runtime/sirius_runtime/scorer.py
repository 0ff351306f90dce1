"""Processes a batch's logits before tokens are chosen by them, and reports log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sirius_runtime.logits import (
    History,
    Logprobs,
    node_histories,
    processors,
    read_logprobs,
    step_logprobs,
    verdict_logprobs,
)
from sirius_runtime.logits_options import LogitsSpec, TokenLogprobs
from sirius_runtime.policy import Verdict
from sirius_runtime.request import Request
from sirius_runtime.tree import Tree


class Scorer:
    """Holds the histories of a batch's rows, processes their logits, and computes
    log-probabilities.

    A row's history is its prompt and its committed tokens; callers pass its length (`count`).
    """

    def __init__(
        self, request: Request, rows: int, capacity: int, vocabulary: int, device: torch.device
    ) -> None:
        """capacity: the most tokens of a row, including a draft after its last token."""
        scoring = request.scoring
        self._processors = processors(
            LogitsSpec() if scoring is None else scoring.logits,
            () if scoring is None else scoring.processors,
            eos=request.eos,
            max_new_tokens=request.max_new_tokens,
            vocabulary=vocabulary,
            device=device,
        )
        self._count = None if scoring is None else scoring.logprobs
        self._logprobs: Logprobs | None = None
        self._tokens = torch.zeros(rows, capacity, dtype=torch.int64, device=device)
        self._prompts = torch.zeros(rows, dtype=torch.int64, device=device)

    def begin(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Sets the rows' prompts, and the tokens that are already committed after them."""
        for row, prompt in enumerate(prompts):
            tokens = [*prompt, *(answers[row] if answers else ())]
            self._tokens[row, : len(tokens)] = torch.tensor(tokens)
        self._prompts = torch.tensor([len(p) for p in prompts], device=self._tokens.device)

    def pick(
        self, logits_BV: Tensor, count_B: Tensor, choose: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Processes the logits after `count` tokens of each row, and chooses a token [B] from them
        by `choose`. The token is added to the history.
        """
        logits = self._processed(logits_BV, History(self._tokens, count_B, self._prompts))
        token = choose(logits)
        if self._count is not None:
            self._logprobs = step_logprobs(logits, token, self._count)
        self._remember(token[:, None], count_B)
        return token

    def nodes(self, logits_BnV: Tensor, count_B: Tensor, tree: Tree, nodes: Tensor) -> Tensor:
        """Processed logits after `nodes` [n] of every row's tree. The tree's root is the last of
        the row's `count` tokens.
        """
        if not self._processors:
            return logits_BnV
        committed = History(self._tokens, count_B, self._prompts)
        flat = self._processed(logits_BnV.flatten(0, 1), node_histories(committed, tree, nodes))
        return flat.unflatten(0, logits_BnV.shape[:2])

    def commit(self, logits_BNV: Tensor, count_B: Tensor, verdict: Verdict) -> None:
        """Adds the tokens that a period committed after `count` tokens of each row. The logits are
        the processed ones.
        """
        if self._count is not None:
            self._logprobs = verdict_logprobs(logits_BNV, verdict, self._count)
        self._remember(verdict.tokens, count_B)

    def logprobs(self) -> list[list[TokenLogprobs]]:
        """The log-probabilities of each row's latest tokens."""
        assert self._logprobs is not None
        return read_logprobs(self._logprobs)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows."""
        kept = list(rows)
        self._tokens, self._prompts = self._tokens[kept], self._prompts[kept]

    def _processed(self, logits_RV: Tensor, history: History) -> Tensor:
        for process in self._processors:
            logits_RV = process(logits_RV.float(), history)
        return logits_RV

    def _remember(self, tokens_BK: Tensor, count_B: Tensor) -> None:
        """Writes tokens after the first `count` of each row. Tokens that the row does not commit
        lie beyond its next count, and are overwritten later.
        """
        places = count_B[:, None] + torch.arange(tokens_BK.shape[1], device=tokens_BK.device)
        self._tokens.scatter_(1, places, tokens_BK)
