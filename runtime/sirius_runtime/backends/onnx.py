"""ONNX Runtime: an artifact's ONNX graphs, run without PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sirius_runtime.backends.onnx_graphs import OnnxGraphs
from sirius_runtime.backends.onnx_state import OnnxState
from sirius_runtime.decoder import Choose, Decoder, Strategy, Way, steps
from sirius_runtime.errors import BackendError, ConfigError
from sirius_runtime.one_graph import OneGraph
from sirius_runtime.plan import sampling_inputs
from sirius_runtime.request import Request
from sirius_runtime.rules import RULES
from sirius_runtime.sampling import NO_TOKEN, Sampling
from sirius_runtime.sizes import cache_slots
from sirius_runtime.stats import PhaseClock

if TYPE_CHECKING:
    from sirius_runtime.scorer import Scorer


class OnnxBackend(OnnxGraphs):
    """See `sirius_runtime.decoder.Backend`."""

    explains = False
    looks_up = False
    stream_seconds = 0.0

    def open(self, request: Request, rows: int, tokens: int, clock: PhaseClock) -> Decoder:
        drafts: Strategy = OneGraph(self.limits)
        choose, scorer = self._chooser(request.plan.sampling), None
        # A period graph writes blocks of the period that it was compiled for, not the request's.
        period = self.limits.period if request.whole_periods else request.period
        if not request.graphs_serve:
            drafts, choose, scorer = self._processed(request, rows, tokens)
        return Decoder(
            OnnxState(self, rows, cache_slots(tokens, period, max(request.widths))),
            {Way.DRAFT: drafts, **steps(choose)},
            choose,
            clock,
            refresh=request.refresh,
            scorer=scorer,
        )

    def _chooser(self, sampling: Sampling) -> Choose:
        """Chooses each row's likeliest token; in sampling, a token that the graph `pick` draws."""

        def choose(
            logits_BV: np.ndarray, count_B: np.ndarray, number_B: np.ndarray | None
        ) -> np.ndarray:
            if number_B is None:
                token = logits_BV.argmax(-1)
                best = np.take_along_axis(logits_BV, token[:, None], -1)[:, 0]
                return np.where(np.isfinite(best), token, NO_TOKEN)
            inputs = {"logits": logits_BV.astype(self.dtype), "uniform": number_B}
            numbers = {n: np.array(*pair) for n, pair in sampling_inputs(sampling).items()}
            tokens: np.ndarray = self.run("pick", inputs | numbers)["tokens"]
            return tokens

        return choose

    def _processed(
        self, request: Request, rows: int, tokens: int
    ) -> tuple[Strategy, Choose, Scorer]:
        """The parts of a decoder for a request that no graph of the artifact can serve.

        Raises ConfigError for a tree, and BackendError where PyTorch is not installed.
        """
        asked = request.scoring.names if request.scoring else "min_p, typical_p"
        if request.mode in RULES and request.mode not in self.program.period.rules:
            asked = f"mode {request.mode}"
        if request.mode in RULES and max(request.widths) > 1:
            raise ConfigError(
                f"{asked}: backend onnxruntime drafts chains where logits are processed, and "
                f"tree_width is {max(request.widths)}; pass tree_width=1, or use backend eager"
            )
        try:
            import torch

            from sirius_runtime.backends.onnx_by_entries import OnnxByEntries, onnx_chooser
            from sirius_runtime.by_entries import ByEntries
            from sirius_runtime.scorer import Scorer
        except ImportError as error:
            raise BackendError(
                f"{asked}: backend onnxruntime processes logits with PyTorch, which is missing "
                f"here ({error}); pip install torch, or switch these off (see LogitsOptions: "
                "repetition_penalty=1.0, suppress_tokens=[], …)"
            ) from error
        vocabulary = self.program.model.vocab_size
        scorer = Scorer(request, rows, tokens + request.period, vocabulary, torch.device("cpu"))
        choose = onnx_chooser(request.plan.sampling, scorer)
        return OnnxByEntries(ByEntries(scorer)), choose, scorer
