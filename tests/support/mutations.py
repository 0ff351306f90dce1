"""Artifacts as an attacker would change them: one value of a document, and hashes that fit."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sirius_runtime.spec import JSON
from tests.support.artifacts import rebuild

MANIFEST = "manifest.json"
PROMPT = [7, 8, 9]

_VALUES: tuple[JSON, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 127, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30),
    *(0.0, 0.5, -0.5, 1.5, 1e308, float("inf"), float("nan"), {"float": "nan"}, {"float": "inf"}),
    *("", "x", "\ud800", "model", "B", "T", "\x1b[2J", "../x", "__class__", "inf", "self", "torch"),
    *([], {}, [0], [[]], {"node": "x"}, {"dtype": "float64"}, {"dtype": "complex64"}),
    *({"dtype": "model"}, {"device": "cuda"}, {"layout": "torch.sparse_coo"}, {"graph": {}}),
)
_DEPTH = 450  # of lists: too deep for Python's functions, and not for its JSON
_TARGETS = (
    *("aten._reshape_alias.default", "aten.segment_reduce.default", "aten.as_strided.default"),
    *("aten.resize_.default", "aten.set_.source_Storage", "aten.add_.Tensor", "aten.neg.default"),
    *("aten.mul.Tensor", "aten.view.default", "aten.slice.Tensor", "aten.item.default"),
    *("aten.gather.default", "aten.cat.default", "aten.sum.dim_IntList", "aten.t.default"),
    *("sirius.cached_attention.default", "sirius.dense_mlp.default", "python.getitem"),
    *("python.mul", "control_flow.cond", "control_flow.while_loop", "python.eval"),
)


def mutated(text: str, chance: random.Random) -> JSON:
    """The document of a JSON text, one thing changed: a value, a place, an order, a reference."""
    document = json.loads(text)
    every = list(containers(document))
    container = chance.choices(every, [len(c) for c in every])[0]
    key = chance.choice(keys_of(container))
    if chance.random() < 0.01:
        container[key] = nested(_DEPTH)
        return document
    match chance.randrange(8):
        case 0:
            del container[key]
        case 1:  # a value of elsewhere in the document
            other = chance.choice(every)
            container[key] = copy.deepcopy(other[chance.choice(keys_of(other))])
        case 2:  # two of a list in each other's places
            chosen = chance.choice([c for c in every if isinstance(c, list) and len(c) > 1])
            i, j = chance.randrange(len(chosen)), chance.randrange(len(chosen))
            chosen[i], chosen[j] = chosen[j], chosen[i]
        case 3:
            numbers = [(c, k) for c in every for k in keys_of(c) if type(c[k]) in (int, float)]
            container, key = chance.choice(numbers)
            container[key] = changed_number(container[key], chance)
        case 4:
            targets = [c for c in every if isinstance(c, dict) and "target" in c]
            if targets:
                chance.choice(targets)["target"] = chance.choice(_TARGETS)
        case 5:  # a reference to another node
            nodes = [c for c in every if isinstance(c, dict) and list(c) == ["node"]]
            if len(nodes) > 1:
                first, second = chance.sample(nodes, 2)
                first["node"] = second["node"]
        case _:
            container[key] = copy.deepcopy(chance.choice(_VALUES))
    return document


def nested(depth: int) -> JSON:
    """A list in a list in a list…"""
    value: JSON = []
    for _ in range(depth):
        value = [value]
    return value


def containers(document: JSON) -> Iterator[Any]:
    """Every list and object of a document that holds something."""
    left = [document]
    while left:
        one = left.pop()
        if one:
            yield one
        left += [v for v in (one.values() if isinstance(one, dict) else one) if is_container(v)]


def is_container(value: JSON) -> bool:
    return isinstance(value, dict | list)


def keys_of(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def changed_number(value: int | float, chance: random.Random) -> JSON:
    return chance.choice(
        (value + 1, value - 1, value * 2, -value, value // 2, 0, 1, value * 10**9, float(value))
    )


def hostile(sound: Path, folder: Path, count: int, seed: int) -> Iterator[tuple[str, Path]]:
    """`count` artifacts, each with one document of `sound` changed; and what was."""
    from sirius_runtime.artifact import Artifact

    chance = random.Random(seed)
    with Artifact.open(sound) as artifact:
        names = [MANIFEST, MANIFEST, *artifact.names("graphs/")]
        documents = {name: artifact.read_bytes(name).decode() for name in set(names)}
    for index in range(count):
        name = chance.choice(names)
        path = folder / "hostile.sirius"
        path.write_bytes(sound.read_bytes())
        spoil(path, name, mutated(documents[name], chance))
        yield f"seed {seed}, case {index}: {name}", path


def attack(sound: Path, folder: Path, count: int, seed: int) -> dict[str, int]:
    """Loads and runs hostile artifacts; whatever else than a user's error they raise ends it.

    Run in a process of its own, which imports the runtime alone: it may be killed.
    """
    found = {"refused": 0, "loaded": 0, "failed": 0}
    for case, path in hostile(sound, folder, count, seed):
        print(case, flush=True)  # noqa: T201  (the last one says where it died)
        found[outcome(path, ("eager", "period")[seed % 2])] += 1
    return found


def outcome(path: Path, backend: str) -> str:
    """What comes of an artifact: user's errors are all that may be raised."""
    from sirius_runtime import load
    from sirius_runtime.errors import UserError

    try:
        model = load(path, device="cpu", backend=backend, progress=lambda _: None)
    except UserError:
        return "refused"
    try:
        model.generate(PROMPT, max_new_tokens=9)
    except UserError:
        return "failed"
    return "loaded"


def spoil(path: Path, name: str, document: JSON) -> None:
    """Puts a document in the place of an entry, with hashes that fit."""
    if name == MANIFEST:

        def replace(manifest: dict[str, Any]) -> None:
            manifest.clear()
            manifest.update(document if isinstance(document, dict) else {})

        rebuild(path, manifest=replace)
    else:
        text = json.dumps(document).encode()
        rebuild(path, lambda entries: entries.update({name: text}))
