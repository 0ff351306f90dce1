"""The state of a batch of sequences, in PyTorch or NumPy arrays.

Shape letters: `B` rows, `T` tokens of a call, `K` tokens of a period, `V` vocabulary. Every row has
its own length. Code that is the same for both libraries is written once, with `xp` for the library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np

from sirius_runtime.entries import PREFILL, SPARSE
from sirius_runtime.prefix import Prefix
from sirius_runtime.sizes import PREFILL_CHUNK
from sirius_runtime.spec import ProgramSpec
from sirius_runtime.stats import measured_density


class State(ABC):
    """A batch of sequences in progress: caches, lengths, roots and statistics.

    After `prefill`, each row's `root` [B] is its last committed token, whose K/V is not in the
    caches yet; `length` [B] counts the tokens before it. A row that is not `active` [B] does not
    change until `select` drops it. `statistic` [layers, B, I]: by which griffin's `neurons` are
    chosen.
    """

    xp: ClassVar[Any]
    """The library of the arrays: `torch` or `numpy`."""

    def __init__(self, program: ProgramSpec, rows: int) -> None:
        self.program = program
        self._last_position = program.model.max_seq_len - 1
        self.length: Any = self.array(np.zeros(rows, np.int64))
        self.root: Any = self.array(np.zeros(rows, np.int64))
        self.active: Any = self.array(np.ones(rows, bool))
        self.statistic: Any = None
        self.neurons: Any = None
        self.reset()

    @property
    def rows(self) -> int:
        return int(self.root.shape[0])

    def reset(self) -> None:
        """Resets the state for new sequences, in the same storage."""
        self.active, self.statistic = self.active | True, None
        self.kept: Any = self.array(np.zeros(len(self.program.sparsity.counted)))
        self.kept_tokens: Any = self.array(np.zeros((), np.int64))

    @abstractmethod
    def array(self, values: np.ndarray) -> Any:
        """A NumPy array as an array of `xp`, on the state's device."""

    def computing(self) -> AbstractContextManager[Any]:
        """The context in which all work on the state's arrays must run."""
        return nullcontext()

    @abstractmethod
    def run(self, entry: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs an entry on these inputs, and on those of the state that it reads (caches, …)."""

    @abstractmethod
    def chain(self, entry: str, ids_BT: Any, **more: Any) -> dict[str, Any]:
        """Runs an entry over a chain of tokens after each row's history, and writes their K/V to
        the caches.
        """

    @abstractmethod
    def write(self, k_kept: Any, v_kept: Any) -> None:
        """Writes the K/V [layers, B, G, K, D] of K tokens to the cache slots from `length` on."""

    @abstractmethod
    def choose_neurons(self) -> None:
        """Chooses griffin's neurons by the statistic; does nothing for other sparse paths."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows and drops the others."""

    @abstractmethod
    def first_kv(self, tokens: int) -> tuple[Any, Any]:
        """A copy of the K/V [layers, 1, G, P, D] of the first row's first tokens."""

    @abstractmethod
    def restore(self, k: Any, v: Any) -> None:
        """Writes K/V from `first_kv` to the first slots of every row."""

    def fill(self, rows: int) -> None:
        """Fills the batch up to `rows` rows with inactive rows."""
        raise NotImplementedError("graphs of this back end take any number of rows")

    def prefix(self, tokens: Sequence[int]) -> Prefix:
        """Runs tokens as the first row's prompt; returns a copy of their K/V and statistic."""
        _, passes = self.prefill([tokens])
        return Prefix(tuple(tokens), *self.first_kv(len(tokens)), self.statistic, passes)

    def prefill(
        self, prompts: Sequence[Sequence[int]], prefix: Prefix | None = None
    ) -> tuple[Any, int]:
        """Runs the prompts through the full path, in chunks. Returns the logits [B, V] after each
        row's last token, and the number of chunks. prefix: the K/V of tokens that all prompts begin
        with; these are not run.
        """
        begin = 0
        if prefix is not None:
            begin = len(prefix.tokens)
            self.length = self.length * 0
            self.restore(prefix.k, prefix.v)
            if prefix.statistic is not None:
                self.observe(prefix.statistic)  # [layers, 1, I], the same for every row
        xp, longest = self.xp, max(map(len, prompts))
        lengths = self.array(np.array([len(prompt) for prompt in prompts]))
        padded = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        ids = self.array(padded)
        logits_BV = None
        starts = range(begin, longest, PREFILL_CHUNK)
        for start in starts:
            chunk = ids[:, start : start + PREFILL_CHUNK]
            size = chunk.shape[1]
            self.length = xp.clip(lengths, 0, start)
            result = self.chain(
                PREFILL,
                chunk,
                valid=self.array(np.arange(start, start + size)) < lengths[:, None],
                last=xp.clip(lengths - 1 - start, 0, size - 1),
            )
            new = result["logits"][:, 0]
            ends_here = (lengths > start) & (lengths <= start + size)
            logits_BV = new if logits_BV is None else xp.where(ends_here[:, None], new, logits_BV)
            if "statistic" in result:
                self.observe(result["statistic"])
        self.length = lengths
        return logits_BV, len(starts)

    def step(self, entry: str) -> dict[str, Any]:
        """Runs an entry over the root only; for `sparse`, counts the units that it kept."""
        result = self.chain(entry, self.root[:, None])
        if entry == SPARSE:
            self.count_kept(result, self.active)
        return result

    def commit(self, advance: Any, root_B: Any) -> None:
        """Adds `advance` [B] to the lengths of active rows, and sets their roots, the last of the
        committed tokens.
        """
        self.length = self.length + advance * self.active
        self.root = self.xp.where(self.active, root_B, self.root)

    def observe(self, statistic: Any) -> None:
        """Adds terms [layers, B, I] to the neurons' statistic."""
        self.statistic = statistic if self.statistic is None else self.statistic + statistic

    def count_kept(self, result: Mapping[str, Any], rows_B: Any) -> None:
        """Adds the numbers of units that a sparse step kept in these rows [B] (0 or 1)."""
        if "kept" in result:
            self.kept = self.kept + (result["kept"] * rows_B).sum(1)
            self.kept_tokens = self.kept_tokens + rows_B.sum()

    def density(self) -> float:
        """The mean share of the weights' bytes that sparse steps have read so far: measured at
        sites where the number kept differs between tokens, else static.
        """
        return measured_density(self.program.sparsity, self.kept.tolist(), int(self.kept_tokens))
