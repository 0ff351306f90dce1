"""Makes the loop of a period's graph update its carried tensors in place.

    Before                                               After
    %every = block_attention(…, %k_block, …, layer, …)   %out = block_attention_(…, %k_block, …)
    %out, %k_new, … = %every
    %k_next = stack([%k_new of every layer])             %k_block

    %next = index_copy(%carried, …)                      %next = index_copy_(%carried, …)

Compilers need a loop without mutation. Run operator by operator, such a loop copies the block's K/V
in every layer and step to add one token's, and copies all drafted distributions to add one. A graph
or a loop must not write to its inputs, so a tensor that it does not own is cloned first.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sirius_runtime.kernels.attention import block_attention_

aten, sirius = torch.ops.aten, torch.ops.sirius

_BLOCKS = (5, 6)  # arguments k_block and v_block of block_attention; results 1 and 2 are new ones
_LAYER = 11  # its argument `layer`
_FRESH = (aten.new_zeros.default, aten.zeros.default, aten.stack.default)


def write_in_place(module: fx.GraphModule) -> None:
    """Rewrites `module`'s graph and the bodies of its loops; the module itself is changed."""
    graph = module.graph
    for loop in graph.find_nodes(op="call_function", target=torch.ops.higher_order.while_loop):
        _, name, carried, _ = loop.args
        body: Any = module.get_submodule(name.target)
        given = body.graph.find_nodes(op="placeholder")
        written = {given.index(value) for value in [*_rewrite(body.graph), *_copies(body.graph)]}
        body.recompile()
        with graph.inserting_before(loop):
            owned = [
                _copy(graph, v) if i in written and not _is_owned(v, loop, carried) else v
                for i, v in enumerate(carried)
            ]
        loop.update_arg(2, tuple(owned))
    for block in _rewrite(graph):
        with graph.inserting_after(block):
            copy = _copy(graph, block)
        block.replace_all_uses_with(copy, lambda user, copy=copy: user is not copy)  # type: ignore[misc]


def _is_owned(value: Any, loop: fx.Node, carried: Sequence[Any]) -> bool:
    """Whether the graph made `value`, and only this loop uses it, as one carried value."""
    made = value.op == "call_function" and value.target in _FRESH
    return made and list(value.users) == [loop] and sum(v is value for v in carried) == 1


def _copy(graph: fx.Graph, value: Any) -> fx.Node:
    return graph.call_function(aten.clone.default, (value,))


def _rewrite(graph: fx.Graph) -> list[fx.Node]:
    """Rewrites calls of block_attention where it can; returns the blocks that are written now."""
    written: dict[fx.Node, None] = {}
    left = list(graph.find_nodes(op="call_function", target=sirius.block_attention.default))
    while left:
        blocks = _blocks(left[0])
        calls = [call for call in left if _blocks(call) == blocks]
        left = [call for call in left if call not in calls]
        stacks = _stacks(blocks, calls)
        if stacks is None:
            continue
        for block, stack in zip(blocks, stacks, strict=True):
            stack.replace_all_uses_with(block)
            graph.erase_node(stack)
            written[block] = None
        for call in calls:
            _rewrite_call(call)
    return list(written)


def _copies(graph: fx.Graph) -> list[fx.Node]:
    """Makes index_copy of an input in place, if nothing else reads the input and the result is only
    an output. Returns the inputs that are written now.
    """
    written = []
    for node in graph.find_nodes(op="call_function", target=aten.index_copy.default):
        value = node.args[0]
        if (
            value.op == "placeholder"
            and len(value.users) == 1
            and list(node.users) == [graph.output_node()]
        ):
            node.target = aten.index_copy_.default
            written.append(value)
    return written


def _blocks(call: fx.Node) -> list[Any]:
    return [call.args[at] for at in _BLOCKS]


def _stacks(blocks: Sequence[Any], calls: Sequence[fx.Node]) -> list[fx.Node] | None:
    """The two nodes that stack the layers' new K and V.

    None if the calls are not one per layer, their new K and V have another use, or another node
    reads a block and would see the writes.
    """
    if [call.args[_LAYER] for call in calls] != list(range(len(calls))):
        return None
    read = (sirius.block_attention.default, block_attention_)
    if any(user.target not in read for block in blocks for user in block.users):
        return None
    stacks = []
    for result in (1, 2):
        new = [_result(call, result) for call in calls]
        users = {user for value in new if value is not None for user in value.users}
        if None in new or len(users) != 1:
            return None
        (stack,) = users
        if stack.target is not aten.stack.default or stack.args != (new,):
            return None
        stacks.append(stack)
    return stacks


def _result(call: fx.Node, index: int) -> fx.Node | None:
    """The getitem node of result `index`; None if there is not exactly one."""
    taken = [u for u in call.users if u.target is operator.getitem and u.args[1] == index]
    return taken[0] if len(taken) == 1 else None


def _rewrite_call(call: fx.Node) -> None:
    """Replaces a call by one that writes K and V in place and returns only the output."""
    with call.graph.inserting_before(call):
        out = call.graph.call_function(block_attention_, call.args)
    for user in list(call.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(out)
        call.graph.erase_node(user)
    call.graph.erase_node(call)
