"""ONNX Runtime: an artifact's ONNX graphs, run without PyTorch."""

from __future__ import annotations

from sirius_runtime.backends.onnx_decoder import OnnxDecoder
from sirius_runtime.backends.onnx_graphs import OnnxGraphs
from sirius_runtime.decoder import Decoder, Uniform
from sirius_runtime.errors import BackendError, ConfigError
from sirius_runtime.request import RULES, Request
from sirius_runtime.stats import StatsRecorder


class OnnxBackend(OnnxGraphs):
    """See `sirius_runtime.decoder.Engine`."""

    def open(
        self,
        request: Request,
        rows: int,
        tokens: int,
        recorder: StatsRecorder,
        uniform: Uniform | None,
    ) -> Decoder:
        if request.scoring is None and request.plan.sampling.fits_graph:
            return OnnxDecoder(self, request, rows, tokens, recorder, uniform)
        return _scored_decoder(request)(self, request, rows, tokens, recorder, uniform)


def _scored_decoder(request: Request) -> type[OnnxDecoder]:
    """The decoder of requests that no graph of the artifact can serve.

    Raises ConfigError for a tree, and BackendError where PyTorch is not installed.
    """
    asked = request.scoring.names if request.scoring else "min_p, typical_p"
    if request.mode in RULES and max(request.widths) > 1:
        raise ConfigError(
            f"{asked}: backend onnxruntime drafts chains where logits are processed, and "
            f"tree_width is {max(request.widths)}; pass tree_width=1, or use backend eager"
        )
    try:
        from sirius_runtime.backends.onnx_scored import ScoredOnnxDecoder
    except ImportError as error:
        raise BackendError(
            f"{asked}: backend onnxruntime processes logits with PyTorch, which is missing here "
            f"({error}); pip install torch, or switch these off (see LogitsOptions: "
            "repetition_penalty=1.0, suppress_tokens=[], …)"
        ) from error
    return ScoredOnnxDecoder
