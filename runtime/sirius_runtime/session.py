"""The Session: state of a batch of sequences, and the period that drives a program's entries over
it.

Shape letters: `B` rows, `T` tokens of a call, `K` tokens of a chunk, `V` vocabulary. Every row has
its own length. Nothing here reads a device value: what the host wants it takes from the returned
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sirius_runtime.policy import Acceptance, Verdict, chain_mask, judge, select_neurons
from sirius_runtime.spec import Method, ProgramSpec
from sirius_runtime.stats import Phase, StatsRecorder

PREFILL_CHUNK = 512  # tokens of a prompt that one prefill call takes


class Backend(Protocol):
    """Runs a program's entries. Caches among the inputs are written in place."""

    program: ProgramSpec
    device: torch.device
    dtype: torch.dtype

    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs `entry` on its named inputs and returns its named outputs."""
        ...


class Session:
    """A batch of sequences in progress.

    After `prefill`, each row's `root` is its last committed token, whose K/V is not in the cache
    yet; `length` counts the tokens before it. A finished row is made inactive and stays as it is.
    """

    def __init__(self, backend: Backend, rows: int, capacity: int, recorder: StatsRecorder) -> None:
        """Room for `capacity` cache slots a row."""
        self._backend = backend
        self._recorder = recorder
        program, device = backend.program, backend.device
        state = program.state
        shape = (state.layers, rows, state.kv_heads, capacity)
        self._state = {
            "k_cache": torch.zeros(*shape, state.key_dim, dtype=backend.dtype, device=device),
            "v_cache": torch.zeros(*shape, state.value_dim, dtype=backend.dtype, device=device),
        }
        self._uses = {e.name: {i.name for i in e.inputs} for e in program.entries}
        self._last_position = program.model.max_seq_len - 1
        self._kept = torch.zeros(len(program.sparsity.neurons), dtype=torch.float64, device=device)
        self._kept_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.root = torch.zeros(rows, dtype=torch.int64, device=device)
        self.active = torch.ones(rows, dtype=torch.bool, device=device)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Runs the prompts densely, in chunks; returns the first token of each row, [B]."""
        device = self._backend.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        longest = max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ids = ids.to(device)
        statistic: Tensor | None = None
        for start in range(0, longest, PREFILL_CHUNK):
            chunk = ids[:, start : start + PREFILL_CHUNK]
            index = torch.arange(start, start + chunk.shape[1], device=device)
            self.length = lengths.clamp(max=start)
            ends_here = (lengths > start) & (lengths <= start + chunk.shape[1])
            result = self._run(
                "prefill",
                chunk,
                offset=0,
                tree_mask=chain_mask(chunk.shape[1], device),
                valid=index < lengths[:, None],
                last=(lengths - 1 - start).clamp(0, chunk.shape[1] - 1),
            )
            first = result["logits"][:, 0].argmax(-1)
            self.root = torch.where(ends_here, first, self.root)
            if "statistic" in result:
                part = result["statistic"]
                statistic = part if statistic is None else statistic + part
            self._recorder.prefill_passes += 1
        self.length = lengths
        if statistic is not None:
            kept = self._backend.program.sparsity.kept[0]
            self._state["neurons"] = select_neurons(statistic, kept)
        return self.root

    def draft(self, size: int) -> Tensor:
        """`size` - 1 sparse steps from the root; returns the chunk [B, K] = [root, s_1 ..
        s_{K-1}].
        """
        mask = chain_mask(size, self._backend.device)
        chunk = [self.root]
        with self._recorder.clock(Phase.DRAFT):
            for index in range(size - 1):
                logits = self._sparse(chunk[-1], index, mask[:, index : index + 1])
                chunk.append(logits.argmax(-1))
        return torch.stack(chunk, 1)

    def verify(self, chunk_BK: Tensor) -> Tensor:
        """One full forward over the chunk: logits [B, K, V]. Overwrites the draft's K/V."""
        mask = chain_mask(chunk_BK.shape[1], self._backend.device)
        with self._recorder.clock(Phase.VERIFY):
            logits = self._run("full", chunk_BK, offset=0, tree_mask=mask)["logits"]
        self._recorder.full_passes += 1
        return logits

    def commit(
        self,
        chunk_BK: Tensor,
        logits_BKV: Tensor,
        acceptance: Acceptance,
        most_B: Tensor | None = None,
    ) -> Verdict:
        """Accepts, corrects and rolls back: the length moves past the kept tokens, no further.

        A row commits `most_B` tokens at the most, as if its chunk were that short. Slots beyond the
        new length hold stale K/V, which is overwritten before it can be seen.
        """
        verdict = judge(chunk_BK, logits_BKV, acceptance, most_B)
        self.length = self.length + verdict.advance * self.active
        self.root = torch.where(self.active, verdict.root, self.root)
        return verdict

    def period(self, size: int, acceptance: Acceptance, most_B: Tensor | None = None) -> Verdict:
        """One period over a chunk of `size` tokens: draft, verify, commit."""
        chunk = self.draft(size)
        return self.commit(chunk, self.verify(chunk), acceptance, most_B)

    def full_step(self) -> Tensor:
        """One dense greedy step; returns the new root [B]."""
        return self._advance(self.verify(self.root[:, None])[:, 0].argmax(-1))

    def sparse_step(self) -> Tensor:
        """One sparse greedy step that is never verified; returns the new root [B]."""
        mask = chain_mask(1, self._backend.device)
        with self._recorder.clock(Phase.DRAFT):
            token = self._sparse(self.root, 0, mask).argmax(-1)
        return self._advance(token)

    def density(self) -> float:
        """Share of the parameters that a sparse step read so far: measured for `cats`, else
        static.
        """
        sparsity = self._backend.program.sparsity
        tokens = int(self._kept_tokens)
        if sparsity.method is not Method.CATS or tokens == 0:
            return sparsity.density
        skipped = sum(
            (total - kept / tokens) * params
            for total, kept, params in zip(
                sparsity.neurons, self._kept.tolist(), sparsity.neuron_params, strict=True
            )
        )
        return 1.0 - skipped / self._backend.program.model.parameters

    def _advance(self, token: Tensor) -> Tensor:
        self.root = torch.where(self.active, token, self.root)
        self.length = self.length + self.active
        return self.root

    def _sparse(self, token_B: Tensor, index: int, mask: Tensor) -> Tensor:
        """Logits [B, V] of one sparse step at block slot `index`."""
        result = self._run("sparse", token_B[:, None], offset=index, tree_mask=mask)
        if "kept" in result:
            kept = result["kept"][:, :, 0] * self.active
            self._kept += kept.sum(1)
            self._kept_tokens += self.active.sum()
        self._recorder.draft_steps += 1
        return result["logits"][:, 0]

    def _run(
        self, entry: str, ids_BT: Tensor, *, offset: int, tree_mask: Tensor, **extra: Tensor
    ) -> dict[str, Tensor]:
        """Runs an entry over tokens at block slots `offset`, `offset` + 1, … of every row."""
        index = torch.arange(offset, offset + ids_BT.shape[1], device=ids_BT.device)
        slots = self.length[:, None] + index
        inputs = {
            "input_ids": ids_BT,
            "slots": slots,
            # Prompt padding, and tokens that their row will not commit, may lie beyond the last.
            "positions": slots.clamp(max=self._last_position),
            "length": self.length,
            "tree_mask": tree_mask,
            **self._state,
            **extra,
        }
        uses = self._uses[entry]
        return self._backend.run(entry, {k: v for k, v in inputs.items() if k in uses})
