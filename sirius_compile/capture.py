"""Capture: a transformers decoder's graph by torch.export, with no code per model family.

The model is built without storage (fake tensors), so its size does not matter. Two interfaces of
transformers make every decoder export alike: our attention function emits one `sirius::attention`
node a layer, and our mask function returns the *rule* of the mask instead of a tensor. A rule other
than "causal" or "causal within a window" is refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import sirius_runtime.operators  # noqa: F401  (registers sirius::attention)
from sirius_compile.experts import Experts
from sirius_compile.live import check_modules, main_dtype
from sirius_compile.precision import keep_as_found, keep_as_loaded
from sirius_compile.rope import place_tokens_alone
from sirius_passes.program import DENSE, OUTPUTS, Program, Stage, calls
from sirius_passes.tracing import one_at_a_time
from sirius_runtime.dtypes import dtype_name
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.graph import CAPTURE_DTYPE, INPUT, WEIGHT, module_of
from sirius_runtime.spec import StateSpec, WeightSpec

_NAME = "sirius"  # of our attention and mask functions in transformers' registries
_MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class MaskRule:
    """A query attends to its own position and the positions before it; with `window`, only to the
    last `window` of these.
    """

    window: int | None


@dataclass(frozen=True)
class Wanted:
    """The weights that a captured graph reads from a checkpoint.

    `shapes`: weight name → shape. `aliases`: weight name → the other names of a tied weight.
    `names`: every name in the model's state dict. `ignored`: patterns of further names that the
    model's checkpoints may hold. `base`: the prefix of all names except the head's.
    """

    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, tuple[str, ...]]
    names: frozenset[str]
    ignored: tuple[str, ...] = ()
    base: str = ""


@dataclass(frozen=True)
class Capture:
    """A captured model.

    `program` is at stage CAPTURED. `constants` are buffers that no checkpoint holds (rotary
    frequencies), by name, with real values. `wanted` describes the weights.
    """

    program: Program
    constants: Mapping[str, Tensor]
    wanted: Wanted


@one_at_a_time
def capture(
    config: PretrainedConfig,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    live: nn.Module | None = None,
) -> Capture:
    """Captures the decoder that `config` describes. One thread captures at a time.

    `dtype`: the program's dtype. `live`: the model, if it is in memory. If it is in `dtype`, its
    weights keep their dtypes; otherwise the weights that transformers loads in float32 stay in
    float32.

    Raises UnsupportedModelError, with the module or the reason, for a model that can't be captured.
    """
    experts, masks = Experts(), _MaskRecorder()
    AttentionInterface.register(_NAME, _Attention(masks, experts))
    AttentionMaskInterface.register(_NAME, masks)
    ALL_EXPERTS_FUNCTIONS.register(_NAME, experts)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _refusing(config.model_type), torch.no_grad():
        with fake:
            model = _build(config, trust_remote_code, CAPTURE_DTYPE)
            if live is not None:
                check_modules(live, model)
            if live is None or dtype.itemsize > 2 or main_dtype(live) is not dtype:
                keep_as_loaded(model, dtype)
            else:
                keep_as_found(model, live, dtype)
        experts.look_at(model)
        place_tokens_alone(model, config)
        with fake:
            exported = _export(model)
    masks.check()
    aliases = _aliases(model)
    program = _program(exported, model, aliases)
    constants = _constants(config, trust_remote_code, list(program.weights.values()), dtype)
    return Capture(
        program,
        constants,
        Wanted(
            {n: spec.shape for n, spec in program.weights.items() if n not in constants},
            {name: aliases.get(name, ()) for name in program.weights},
            names=frozenset(model.state_dict()),
            ignored=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
            base=str(getattr(model, "base_model_prefix", "")),
        ),
    )


@contextmanager
def _refusing(model_type: str) -> Iterator[None]:
    """Turns any error of a model's own code under export into one that names the model type."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"model type {model_type!r} can't be captured: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Why a model's own code failed under export, in a user's terms."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) and _NAME in error.args:
        return "it has attention classes of its own, which bypass transformers' attention interface"
    if MaskRule.__name__ in text:
        return "it computes with the attention mask outside of transformers' attention interface"
    if text.startswith("Constraints violated"):
        return (
            "its forward works for some numbers of tokens only, as in models that carry a state "
            "from token to token"
        )
    return (
        f"{type(error).__name__}: {text[:200]}. Its forward does something that torch.export or "
        "transformers' attention interface can't express; please open an issue with the model's "
        "config.json"
    )


def _build(config: PretrainedConfig, trust_remote_code: bool, dtype: torch.dtype) -> nn.Module:
    config = copy.deepcopy(config)  # building writes the dtype and function names into it
    config._experts_implementation = _NAME
    config.use_cache = False
    model: nn.Module = AutoModelForCausalLM.from_config(
        config,
        dtype=dtype,
        attn_implementation=_NAME,
        trust_remote_code=trust_remote_code,
    )
    return model.eval()


def _export(model: nn.Module) -> ExportedProgram:
    takes = inspect.signature(model.forward).parameters
    if "position_ids" not in takes:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no position_ids: it derives positions from the order of "
            "tokens in a call (ALiBi, a recurrent state), which drafts and padded rows don't keep"
        )
    rows, tokens = Dim("B", min=1, max=1 << 16), Dim("T", min=1, max=_MAX_TOKENS)
    example = torch.zeros(2, 8, dtype=torch.int64)
    inputs: dict[str, Any] = {
        "input_ids": example,
        "position_ids": torch.arange(8).expand(2, 8).contiguous(),
        # Without a mask, transformers looks for packed sequences in the positions.
        "attention_mask": torch.ones_like(example),
    }
    dynamic: dict[str, Any] = {name: {0: rows, 1: tokens} for name in inputs}
    if "use_cache" in takes:
        inputs["use_cache"], dynamic["use_cache"] = False, None
    return torch.export.export(model, (), inputs, dynamic_shapes=dynamic, strict=False)


class _Attention:
    """transformers' attention function: emits one `sirius::attention` a layer. Tells the mask
    function which masks are used, and the experts function the current layer.
    """

    def __init__(self, masks: _MaskRecorder, experts: Experts) -> None:
        self._masks, self._experts = masks, experts

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: MaskRule | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Emits the operator. `s_aux` [H]: attention sinks."""
        where = type(module).__name__
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(f"{where}: attention that is not causal is not supported")
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise UnsupportedModelError(
                f"{where} has no layer_idx, so its place in the cache is unknown"
            )
        self._experts.layer = layer
        rule = MaskRule(sliding_window)
        if isinstance(attention_mask, MaskRule):
            rule = attention_mask
            self._masks.used.add(id(rule))
        if sliding_window not in (None, rule.window):
            raise UnsupportedModelError(
                f"{where} of layer {layer} asks for a window of {sliding_window}, but its mask has "
                f"a window of {rule.window}"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        output = torch.ops.sirius.attention(
            query, key, value, layer, scale, rule.window, softcap, s_aux
        )
        return output.transpose(1, 2).contiguous(), None  # some models take a view of it


class _MaskRecorder:
    """transformers' mask function: returns the rule of each mask, and keeps the mask's own function
    for `check`.
    """

    def __init__(self) -> None:
        self._masks: list[tuple[Callable[..., Any], MaskRule]] = []
        self.used: set[int] = set()

    def __call__(self, mask_function: Any, local_size: int | None = None, **_: Any) -> MaskRule:
        rule = MaskRule(local_size)
        self._masks.append((mask_function, rule))
        return rule

    def check(self) -> None:
        """Refuses masks in use that do not follow their rule. Call it outside of tracing, as it
        needs real values.
        """
        for mask_function, rule in self._masks:
            if id(rule) not in self.used:
                continue  # some models make masks that none of their layers uses
            window = rule.window
            reach = 2 * (window or 4) + 3
            query = torch.tensor([0, 1, reach // 2, reach - 1])[:, None]
            key = torch.arange(reach)[None, :]
            expected = (key <= query) & (query - key < (window or reach))
            zero = torch.zeros((), dtype=torch.int64)
            try:
                seen = torch.as_tensor(mask_function(zero, zero, query, key)).expand_as(expected)
                matches = torch.equal(seen, expected)  # a mask made of traced values fails here
            except Exception as error:
                raise UnsupportedModelError(
                    "the attention mask depends on more than positions (chunked or blockwise "
                    "attention is not supported)"
                ) from error
            if not matches:
                raise UnsupportedModelError(
                    "the attention mask is neither causal nor causal within a window"
                )


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Canonical name of each tied tensor → its other names."""
    names: dict[int, list[str]] = {}
    for group in (model.named_parameters, model.named_buffers):
        for name, tensor in group(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return {first: tuple(rest) for first, *rest in names.values()}


def _program(
    exported: ExportedProgram, model: nn.Module, aliases: Mapping[str, tuple[str, ...]]
) -> Program:
    """The exported graph, with every placeholder bound by name, and tied weights bound once."""
    canonical = {alias: name for name, others in aliases.items() for alias in (name, *others)}
    persistent = set(model.state_dict())
    graph = exported.graph_module.graph
    # Metadata assertions keep unused inputs alive; export has already checked them.
    for node in calls(graph, torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    _read_sizes_of_input_ids(graph)
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_complex():
            raise UnsupportedModelError(
                f"the model's graph computes with complex numbers, at {node.name} ({node.target}), "
                "which the back ends do not support"
            )
    targets = {
        spec.arg.name: spec
        for spec in exported.graph_signature.input_specs
        if hasattr(spec.arg, "name")
    }
    weights: dict[str, WeightSpec] = {}
    bound: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        spec = targets[node.name]
        if not node.users:
            graph.erase_node(node)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            name = canonical[spec.target]
            if name in bound:
                node.replace_all_uses_with(bound[name])
                graph.erase_node(node)
                continue
            bound[name], node.meta[WEIGHT] = node, name
            value = node.meta["val"]
            weights[name] = WeightSpec(
                name,
                dtype_name(value.dtype),
                tuple(value.shape),
                retype=value.dtype is CAPTURE_DTYPE,
                parameter=name in persistent and value.is_floating_point(),
            )
        elif spec.kind is InputKind.USER_INPUT and node.name in ("input_ids", "position_ids"):
            node.meta[INPUT] = {"position_ids": "positions"}.get(node.name, node.name)
        else:
            raise UnsupportedModelError(
                f"the model's graph reads {node.name} ({spec.kind.name.lower()}) at "
                f"{next(iter(node.users)).format_node()}, which is not an input of the runtime"
            )
    inputs = {n.meta[INPUT] for n in graph.nodes if INPUT in n.meta}
    if "positions" not in inputs:
        # Every program takes positions, also if the model does not read them.
        _bind_missing_positions(graph)
    output = graph.output_node()
    output.args = ((output.args[0][0],),)
    output.meta[OUTPUTS] = ("logits",)
    module = module_of(torch.nn.Module(), graph)
    return Program(Stage.CAPTURED, {DENSE: module}, weights, _state(graph))


def _read_sizes_of_input_ids(graph: fx.Graph) -> None:
    """Reads the sizes B and T from input_ids, where the export read them from another input."""
    inputs = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    for node in calls(graph, torch.ops.aten.sym_size.int):
        if node.args[0] is inputs.get("attention_mask"):
            node.args = (inputs["input_ids"], node.args[1])


def _bind_missing_positions(graph: fx.Graph) -> None:
    (ids,) = [n for n in graph.nodes if n.meta.get(INPUT) == "input_ids"]
    with graph.inserting_after(ids):
        node = graph.placeholder("position_ids")
    node.meta |= {"val": ids.meta["val"], INPUT: "positions"}


def _state(graph: fx.Graph) -> StateSpec:
    """The KV cache that the graph's attention nodes need. Raises UnsupportedModelError if layers
    differ in heads or head size, or are missing.
    """
    nodes = [n for n in graph.nodes if n.target is torch.ops.sirius.attention.default]
    shapes = {(n.args[1].meta["val"].shape[1::2], n.args[2].meta["val"].shape[-1]) for n in nodes}
    layers = [n.args[3] for n in nodes]
    if len(shapes) != 1 or layers != list(range(len(nodes))):
        raise UnsupportedModelError(
            f"attention layers {layers} with key/value shapes {sorted(map(str, shapes))}: the "
            "cache needs layers 0, 1, … once each, with one number of heads and one head size"
        )
    ((heads, key_dim), value_dim) = shapes.pop()
    return StateSpec(len(nodes), int(heads), int(key_dim), int(value_dim))


def _constants(
    config: PretrainedConfig,
    trust_remote_code: bool,
    weights: list[WeightSpec],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Real values of the buffers that no checkpoint holds, computed as from_pretrained does for a
    model in `dtype`.

    Parameters stay on the meta device. Buffers are filled with NaN and then set by the model's own
    initialisation; one that is still NaN is refused with UnsupportedModelError.
    """
    with torch.device("meta"):
        model = _build(config, trust_remote_code, dtype)
    persistent = set(model.state_dict())
    wanted = {spec.name for spec in weights} - persistent
    for module in model.modules():
        if not module._buffers:
            continue
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                fill = float("nan") if buffer.is_floating_point() else 0
                module._buffers[name] = torch.full_like(buffer, fill, device="cpu")
        with torch.no_grad():
            model._init_weights(module)  # type: ignore[operator]
    constants = {name: b for name, b in model.named_buffers() if name in wanted}
    for name in wanted:
        value = constants.get(name)
        if value is None or (value.is_floating_point() and bool(value.isnan().any())):
            raise UnsupportedModelError(
                f"buffer {name} is in no checkpoint and the model's initialisation does not set it"
            )
    return constants
