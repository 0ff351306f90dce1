"""The Session: state of a batch of sequences, and the period that drives a program's entries over
it.

Shape letters: `B` rows, `T` tokens of a call, `N` nodes of a draft tree, `K` tokens of a path, `V`
vocabulary. Every row has its own length. Nothing here reads a device value, but whether any row
drafts on where drafting is adaptive: what else the host wants it takes from the returned tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sirius_runtime.drafting import DraftState, begin, extend, first_levels
from sirius_runtime.plan import Limits, Plan
from sirius_runtime.policy import Draft, Verdict, judge, likeliest, observed, select_neurons
from sirius_runtime.sizes import PREFILL_CHUNK
from sirius_runtime.spec import ProgramSpec
from sirius_runtime.stats import Phase, StatsRecorder, measured_density
from sirius_runtime.tree import Tree, beams

Pick = Callable[[Tensor], Tensor]
"""Chooses a token [B] by logits [B, V]."""


class Backend(Protocol):
    """Runs a program's entries. Caches among the inputs are written in place."""

    program: ProgramSpec
    device: torch.device
    dtype: torch.dtype
    limits: Limits | None
    """What the entry `period` can take, where whole periods are to run as that one graph."""

    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs `entry` on its named inputs and returns its named outputs."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a period did: the first `advance` [B] of `tokens` [B, K] are committed; `drafted` [B]
    levels counted for a row. All in one tensor, `packed` [B, K + 2] int64: the host reads it at
    once.
    """

    packed: Tensor

    @classmethod
    def of(cls, tokens: Tensor, advance: Tensor, drafted: Tensor) -> Outcome:
        return cls(torch.cat([tokens, advance[:, None], drafted[:, None]], 1))

    @property
    def tokens(self) -> Tensor:
        return self.packed[:, :-2]

    @property
    def advance(self) -> Tensor:
        return self.packed[:, -2]

    @property
    def drafted(self) -> Tensor:
        return self.packed[:, -1]


def greedy(logits_BV: Tensor) -> Tensor:
    """The likeliest token [B]."""
    return likeliest(logits_BV)


class Session:
    """A batch of sequences in progress.

    After `prefill`, each row's `root` is its last committed token, whose K/V is not in the cache
    yet; `length` counts the tokens before it. A finished row is made inactive and stays as it is,
    until `select` leaves it out.
    """

    resizable: ClassVar[bool] = True
    """Whether `select` can leave rows out."""

    def __init__(
        self,
        backend: Backend,
        rows: int,
        capacity: int,
        recorder: StatsRecorder,
        *,
        refresh: int = 0,
    ) -> None:
        """Room for `capacity` cache slots a row.

        refresh: periods after which `griffin` chooses its neurons anew, from the prompt and the
        tokens verified so far; 0 for never.
        """
        self._backend = backend
        self._recorder = recorder
        self._refresh, self._periods = refresh, 0
        program, device = backend.program, backend.device
        state = program.state
        shape = (state.layers, rows, state.kv_heads, capacity)
        self._state = {
            "k_cache": torch.zeros(*shape, state.key_dim, dtype=backend.dtype, device=device),
            "v_cache": torch.zeros(*shape, state.value_dim, dtype=backend.dtype, device=device),
        }
        self._uses = {e.name: {i.name for i in e.inputs} for e in program.entries}
        self._last_position = program.model.max_seq_len - 1
        self._kept = torch.zeros(len(program.sparsity.counted), dtype=torch.float64, device=device)
        self._kept_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._statistic: Tensor | None = None
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.root = torch.zeros(rows, dtype=torch.int64, device=device)
        self.active = torch.ones(rows, dtype=torch.bool, device=device)

    def prefill(self, prompts: Sequence[Sequence[int]], pick: Pick = greedy) -> Tensor:
        """Runs the prompts densely, in chunks; returns the first token of each row, [B]."""
        device = self._backend.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        longest = max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ids = ids.to(device)
        logits_BV: Tensor | None = None  # after each row's last prompt token
        for start in range(0, longest, PREFILL_CHUNK):
            chunk = ids[:, start : start + PREFILL_CHUNK]
            index = torch.arange(start, start + chunk.shape[1], device=device)
            self.length = lengths.clamp(max=start)
            ends_here = (lengths > start) & (lengths <= start + chunk.shape[1])
            slots = index - start
            distance = slots[:, None] - slots
            result = self._run(
                "prefill",
                chunk,
                slots=slots,
                depth=slots,
                tree_mask=distance.clamp(min=-1)[None],
                valid=index < lengths[:, None],
                last=(lengths - 1 - start).clamp(0, chunk.shape[1] - 1),
            )
            new = result["logits"][:, 0]
            logits_BV = (
                new if logits_BV is None else torch.where(ends_here[:, None], new, logits_BV)
            )
            if "statistic" in result:
                part = result["statistic"]
                self._statistic = part if self._statistic is None else self._statistic + part
            self._recorder.prefill_passes += 1
        assert logits_BV is not None
        self.length = lengths
        # Once: with a pick a chunk, a longer neighbour would use up a row's random numbers.
        self.root = pick(logits_BV)
        self._choose_neurons()
        return self.root

    def draft(self, plan: Plan, most_B: Tensor) -> Draft:
        """Sparse steps from the root, a level of the tree each; leaves out levels never drafted."""
        device = self._backend.device
        state = begin(
            self.root,
            self.active,
            most_B,
            size=plan.size,
            width=plan.width,
            sampled_from=self._backend.program.model.vocab_size if plan.draws else None,
        )
        # Made on the device: a graph of its work could not hold a copy from the host.
        confidence = torch.full((), plan.confidence, dtype=torch.float32, device=device)
        proposer = plan.proposer
        levels = 0
        with self._recorder.clock(Phase.DRAFT):
            for levels in range(1, plan.size):
                level = torch.full((), levels, dtype=torch.int64, device=device)
                count = 1 if levels == 1 else plan.width
                logits = self._draft_step(state, level, plan.width, count)
                state = extend(state, logits, level, plan.width, proposer, most_B, confidence)
                if not self._drafts_on(plan, state):
                    break
        return first_levels(state.draft, levels, plan.width)

    def verify(self, tree: Tree) -> dict[str, Tensor]:
        """One full forward over the tree: logits [B, N, V]. Overwrites the draft's K/V."""
        nodes = torch.arange(tree.tokens.shape[1], device=self._backend.device)
        with self._recorder.clock(Phase.VERIFY):
            result = self._run_nodes("observe" if self._refresh else "full", tree, nodes)
        self._recorder.full_passes += 1
        return result

    def commit(self, draft: Draft, logits_BNV: Tensor, plan: Plan, most_B: Tensor) -> Verdict:
        """Accepts, corrects and rolls back: the length moves past the kept tokens, no further.

        A row commits `most_B` tokens at the most, as if its draft were that short. The K/V of the
        kept path moves into the slots of its positions; slots beyond the new length hold stale K/V,
        which is overwritten before it can be seen.
        """
        verdict = judge(draft, logits_BNV, plan.acceptance, most_B, plan.size)
        if plan.width > 1:  # in a chain it lies there already
            self._compact(verdict.nodes)
        self.length = self.length + verdict.advance * self.active
        self.root = torch.where(self.active, verdict.root, self.root)
        return verdict

    def period(self, plan: Plan, most_B: Tensor) -> Outcome:
        """One period: draft, verify, commit."""
        return self._period(plan, most_B, self._count_period())

    def _count_period(self) -> bool:
        """Counts a period that begins; whether neurons are to be chosen anew at its end."""
        self._periods += 1
        return self._refresh > 0 and self._periods % self._refresh == 0

    def _period(self, plan: Plan, most_B: Tensor, due: bool) -> Outcome:
        draft = self.draft(plan, most_B)
        result = self.verify(draft.tree)
        verdict = self.commit(draft, result["logits"], plan, most_B)
        if self._refresh:
            self._observe(result["activity"], verdict)
        if due:
            self._choose_neurons()
        return Outcome.of(verdict.tokens, verdict.advance, draft.depth)

    def _drafts_on(self, plan: Plan, state: DraftState) -> bool:
        """Whether the next level is worth a step: the one read of the device, where drafts may
        stop early.
        """
        return plan.confidence == 0.0 or bool(state.live.any())

    def full_step(self, pick: Pick = greedy) -> Tensor:
        """One dense step; returns the new root [B]."""
        with self._recorder.clock(Phase.VERIFY):
            logits = self._step("full")["logits"][:, 0]
        self._recorder.full_passes += 1
        return self._advance(pick(logits))

    def sparse_step(self, pick: Pick = greedy) -> Tensor:
        """One sparse step that is never verified; returns the new root [B]."""
        with self._recorder.clock(Phase.DRAFT):
            result = self._step("sparse")
        self._count_kept(result, self.active)
        self._recorder.draft_steps += 1
        return self._advance(pick(result["logits"][:, 0]))

    def set_active(self, active_B: Tensor) -> None:
        """Says which rows go on (bool); the others stay as they are."""
        self.active = active_B

    def select(self, rows: Tensor) -> None:
        """Keeps these rows (int64 indices) and leaves the others out, with their state."""
        self._state = {n: value[:, rows].contiguous() for n, value in self._state.items()}
        if self._statistic is not None:
            self._statistic = self._statistic[:, rows]
        self.length, self.root, self.active = (
            value[rows] for value in (self.length, self.root, self.active)
        )

    def density(self) -> float:
        """Share of the parameters that a sparse step read so far: measured where tokens differ in
        what they keep, else static.
        """
        sparsity = self._backend.program.sparsity
        return measured_density(sparsity, self._kept.tolist(), int(self._kept_tokens))

    def _advance(self, token: Tensor) -> Tensor:
        self.root = torch.where(self.active, token, self.root)
        self.length = self.length + self.active
        return self.root

    def _draft_step(self, state: DraftState, level: Tensor, width: int, count: int) -> Tensor:
        """Logits [B, W, V] of one sparse step over the `count` nodes above `level`."""
        result = self._run_nodes("sparse", state.tree, beams(level - 1, width, count))
        self._count_kept(result, state.live)
        self._recorder.draft_steps += 1
        return result["logits"]

    def _count_kept(self, result: Mapping[str, Tensor], rows_B: Tensor) -> None:
        if "kept" in result:
            self._kept += (result["kept"] * rows_B).sum(1)
            self._kept_tokens += rows_B.sum()

    def _compact(self, nodes_BK: Tensor) -> None:
        """Moves the K/V of a path's nodes to the slots after `length`, in order."""
        source = (self.length[:, None] + nodes_BK)[None, :, None, :, None]
        for name in ("k_cache", "v_cache"):
            cache = self._state[name]
            shape = (*cache.shape[:3], nodes_BK.shape[1], cache.shape[4])
            self._write(name, cache.gather(3, source.expand(shape)))

    def _write(self, name: str, kept: Tensor) -> None:
        """Writes K/V [layers, B, G, K, D] of K tokens to the slots of a cache after `length`."""
        index = torch.arange(kept.shape[3], device=kept.device)
        slots = (self.length[:, None] + index)[None, :, None, :, None]
        self._state[name].scatter_(3, slots.expand(kept.shape), kept)

    def _observe(self, activity: Tensor, verdict: Verdict) -> None:
        """Adds what verified tokens say of the neurons."""
        assert self._statistic is not None
        self._statistic = self._statistic + observed(activity, verdict.nodes, verdict.advance)

    def _choose_neurons(self) -> None:
        if self._statistic is not None:
            kept = self._backend.program.sparsity.kept_neurons
            self._state["neurons"] = select_neurons(self._statistic, kept)

    def _step(self, entry: str) -> dict[str, Tensor]:
        """Runs an entry over the root alone."""
        zero = torch.zeros(1, dtype=torch.int64, device=self._backend.device)
        return self._run(
            entry, self.root[:, None], slots=zero, depth=zero, tree_mask=zero[None, None]
        )

    def _run_nodes(self, entry: str, tree: Tree, nodes: Tensor) -> dict[str, Tensor]:
        """Runs an entry over these nodes [T] of every row's tree."""
        return self._run(
            entry,
            tree.tokens.index_select(1, nodes),
            slots=nodes,
            depth=tree.depth.index_select(1, nodes).clamp(min=0),
            tree_mask=tree.mask.index_select(1, nodes),
        )

    def _run(
        self,
        entry: str,
        ids_BT: Tensor,
        *,
        slots: Tensor,
        depth: Tensor,
        tree_mask: Tensor,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        """Runs an entry over tokens at block `slots` [T] and `depth` [T | B, T] after each row's
        history.
        """
        length = self.length[:, None]
        inputs = {
            "input_ids": ids_BT,
            "slots": length + slots,
            # Prompt padding, and tokens that their row will not commit, may lie beyond the last.
            "positions": (length + depth).clamp(max=self._last_position),
            "length": self.length,
            "tree_mask": tree_mask,
            **self._state,
            **extra,
        }
        uses = self._uses[entry]
        return self._backend.run(entry, {k: v for k, v in inputs.items() if k in uses})
