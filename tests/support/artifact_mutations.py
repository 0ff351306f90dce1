"""Artifacts as an attacker would change them: one or several changes, and hashes that fit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from tests.support.artifacts import rezipped
from tests.support.mutations import MANIFEST, mutated

Entries = dict[str, bytes]


@dataclass(frozen=True)
class Sound:
    """An artifact as it was, its entries, and what it says."""

    name: str
    content: bytes
    entries: Mapping[str, bytes]
    tokens: list[int]

    @classmethod
    def read(cls, name: str, path: Path, tokens: list[int]) -> Sound:
        with zipfile.ZipFile(path) as archive:
            entries = {entry: archive.read(entry) for entry in archive.namelist()}
        return cls(name, path.read_bytes(), entries, tokens)


@dataclass(frozen=True)
class Changed:
    """A changed artifact. `harmless`: where it loads, it says what it said."""

    sound: Sound
    kind: str
    what: str
    content: bytes
    harmless: bool = False


Change = Callable[[Sound, random.Random], tuple[str, bytes]]


def changed(case: int, kinds: Sequence[str], sound: Mapping[str, Sound]) -> Changed:
    """The artifact of a case, by its number alone."""
    chance = random.Random(case)
    kind = chance.choice(list(kinds))
    one = sound[chance.choice(sorted(sound))]
    change, harmless = KINDS[kind]
    what, content = change(one, chance)
    return Changed(one, kind, f"{kind} of {one.name}, {what}", content, harmless)


def _packed(entries: Entries, chance: random.Random, manifest: Any = None) -> bytes:
    """A ZIP of entries whose manifest has the right sizes and hashes of the others."""
    document = json.loads(entries[MANIFEST]) if manifest is None else manifest
    if isinstance(document, dict) and chance.random() < 0.98:
        document["files"] = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in entries.items()
            if name != MANIFEST
        }
    others = {name: data for name, data in entries.items() if name != MANIFEST}
    return rezipped({**others, MANIFEST: json.dumps(document).encode()})


def _several(text: bytes, chance: random.Random) -> Any:
    """A JSON text changed once, now and then more often."""
    document = json.loads(text)
    while True:
        # IndexError, ValueError: nothing is left that this change is of.
        with contextlib.suppress(IndexError, ValueError):
            document = mutated(json.dumps(document), chance)
        if chance.random() < 0.7 or not isinstance(document, dict | list) or not document:
            return document


def of_manifest(sound: Sound, chance: random.Random) -> tuple[str, bytes]:
    manifest = _several(sound.entries[MANIFEST], chance)
    return "", _packed(dict(sound.entries), chance, manifest)


def of_graph(sound: Sound, chance: random.Random) -> tuple[str, bytes]:
    names = [name for name in sound.entries if name.startswith("graphs/")]
    return _document(sound, chance, chance.choice(names))


def of_inserted(sound: Sound, chance: random.Random) -> tuple[str, bytes]:
    """Calls put into a graph: any operator of the table, over values that are there. Now and then
    what reads another value reads theirs.
    """
    name = chance.choice([name for name in sound.entries if name.startswith("graphs/")])
    document = json.loads(sound.entries[name])
    told = []
    for index in range(chance.choice((1, 1, 2, 4))):
        nodes = _nodes(document, chance)
        at = chance.randrange(1, len(nodes))
        there = [node["name"] for node in nodes[:at] if node["op"] != "graph"]
        call = _call(f"inserted_{index}", there[-12:] + there[:12], chance)
        nodes.insert(at, call)
        told.append(call["target"])
        if chance.random() < 0.5 and (reads := list(_references(nodes[at + 1 :]))):
            chance.choice(reads)["node"] = call["name"]
    entries = {**sound.entries, name: json.dumps(document).encode()}
    return f"{name}: {', '.join(told)}", _packed(entries, chance)


def _nodes(document: Any, chance: random.Random) -> list[Any]:
    """The nodes of a graph, or of one within it."""
    inner = [node["graph"] for node in document["nodes"] if node["op"] == "graph"]
    found: list[Any] = document["nodes"]
    if inner and chance.random() < 0.6:
        return _nodes(chance.choice(inner), chance)
    return found


def _references(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for one in value:
            yield from _references(one)
    elif isinstance(value, dict):
        if list(value) == ["node"]:
            yield value
        elif value.get("op") != "graph":
            yield from _references(list(value.values()))


def _call(name: str, there: Sequence[str], chance: random.Random) -> Any:
    """A call of any operator, by its schema."""
    from sirius_runtime.graph_operators import FUNCTIONS, OPERATORS, parameters

    if chance.random() < 0.1:
        args = [_argument("SymInt", there, (), chance) for _ in range(2)]
        target = f"python.{chance.choice(list(FUNCTIONS))}"
        return {"name": name, "op": "call", "target": target, "args": args}
    target = chance.choice(list(OPERATORS))
    if chance.random() < 0.6:  # operands of one shape fit more often
        there = [chance.choice(there)]
    namespace, packet, overload = target.split(".")
    own = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    args, kwargs = [], {}
    for one in parameters(own):
        if not one.required and chance.random() < 0.6:
            if one.keyword_only:
                continue
            break
        strings = (OPERATORS[target].strings or {}).get(one.name, ())
        value = _argument(one.kind, there, strings, chance)
        value = None if one.optional and chance.random() < 0.3 else value
        if one.keyword_only:
            kwargs[one.name] = value
        else:
            args.append(value)
    return {"name": name, "op": "call", "target": target, "args": args, "kwargs": kwargs}


def _argument(
    kind: str, there: Sequence[str], strings: Sequence[str], chance: random.Random
) -> Any:
    """A value of a kind that schemas name; `there`: the nodes that it may refer to."""
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        return [_argument(inner, there, strings, chance) for _ in range(chance.randrange(5))]
    kind = kind.removeprefix("Optional[").removesuffix("]")
    if kind == "Tensor" or chance.random() < 0.1:
        return {"node": chance.choice(there)}
    match kind:
        case "int" | "SymInt" | "number":
            return chance.choice(_SIZES)
        case "float":
            return chance.choice((0.0, 1.0, -1.5, 1e-6, 1e30, {"float": "nan"}, {"float": "inf"}))
        case "bool":
            return chance.random() < 0.5
        case "str":
            return chance.choice([*strings, "x"])
        case "ScalarType":
            return {"dtype": chance.choice(("model", "float64", "int64", "bool", "uint8"))}
        case "Device":
            return {"device": "model"}
        case _:
            return None


_SIZES = (
    *(-2, -1, -1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 12, 64, 101),
    *(1000, 10**5, 2**20, 10**8, 2**31, 2**33, 2**40, 2**62, 2**63 - 1, -(2**63)),
)


def of_sizes(sound: Sound, chance: random.Random) -> tuple[str, bytes]:
    """Numbers of the manifest that sizes are made of, to the ends of their ranges, and one value
    of the generation config.
    """
    manifest = json.loads(sound.entries[MANIFEST])
    program = manifest["program"]
    told = []
    for _ in range(chance.choice((1, 2, 3))):
        part, field = chance.choice(_FIELDS)
        holder = program[part]
        if isinstance(holder, list):
            if not holder:
                continue
            holder = chance.choice(holder)
        holder[field] = chance.choice((1, 2, 3, 64, 512, 2**14, 2**20, 2**31 - 1, 2**53))
        told.append(f"{part}.{field} {holder[field]}")
    return ", ".join(told), _packed(dict(sound.entries), chance, manifest)


_FIELDS = (
    *(("model", field) for field in ("vocab_size", "max_seq_len", "parameters")),
    *(("state", field) for field in ("layers", "kv_heads", "key_dim", "value_dim")),
    *(("period", field) for field in ("period", "tree_width", "refresh")),
    *(("weights", field) for field in ("shape", "dtype", "name")),
)


def of_tokenizer(sound: Sound, chance: random.Random) -> tuple[str, bytes]:
    return _document(sound, chance, "tokenizer/tokenizer.json")


def of_other_json(sound: Sound, chance: random.Random) -> tuple[str, bytes]:
    """generation_config.json, chat.json, and the tokenizer's other files."""
    names = [
        name
        for name, data in sound.entries.items()
        if name.endswith(".json") and name != MANIFEST and not name.startswith("graphs/") and data
    ]
    return _document(sound, chance, chance.choice(names))


def _document(sound: Sound, chance: random.Random, name: str) -> tuple[str, bytes]:
    document = _several(sound.entries[name], chance)
    return name, _packed({**sound.entries, name: json.dumps(document).encode()}, chance)


def of_weights(sound: Sound, chance: random.Random) -> tuple[str, bytes]:
    """The header of a safetensors file: its JSON, its length, or bytes of it; or numbers in it."""
    name = chance.choice([n for n in sound.entries if n.startswith("weights/")])
    data = sound.entries[name]
    (size,) = struct.unpack_from("<Q", data)
    header, tensors = data[8 : 8 + size], data[8 + size :]
    match chance.randrange(6):
        case 0:
            size = chance.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1))
        case 1:
            header = _damaged(header, chance)
        case 2:
            values = [0x7F, 0x80, 0xFF, 0x7FC00000 & 0xFF]
            tensors = bytes(chance.choice(values) for _ in tensors)
        case 3:
            tensors = tensors[: chance.randrange(len(tensors))]
        case _:
            header = json.dumps(_several(header, chance)).encode()
            size = len(header)
    return name, _packed(
        {**sound.entries, name: struct.pack("<Q", size % 2**64) + header + tensors}, chance
    )


def of_bytes(sound: Sound, chance: random.Random) -> tuple[str, bytes]:
    """Bytes of an entry, whatever it is."""
    name = chance.choice([name for name, data in sound.entries.items() if data])
    data = _damaged(sound.entries[name], chance)
    if name != MANIFEST:
        return name, _packed({**sound.entries, name: data}, chance)
    return name, rezipped({**sound.entries, MANIFEST: data})


def of_entries(sound: Sound, chance: random.Random) -> tuple[str, bytes]:
    """Entries left out, added, renamed, exchanged or emptied."""
    entries = dict(sound.entries)
    names = [name for name in entries if name != MANIFEST]
    name = chance.choice(names)
    match chance.randrange(5):
        case 0:
            del entries[name]
        case 1:
            entries[chance.choice(_NAMES)] = entries[chance.choice(names)]
        case 2:
            entries[chance.choice(_NAMES)] = entries.pop(name)
        case 3:
            other = chance.choice(names)
            entries[name], entries[other] = entries[other], entries[name]
        case _:
            entries[name] = chance.choice((b"", b"{}", b"[]", b"null", b"0", b"[" * 20_000))
    return name, _packed(entries, chance)


_NAMES = (
    *("../out.txt", "/tmp/out.txt", "a/../../b", "C:/x", "a\\b", "a//b", "x/", ".", "..", "a\nb"),
    *("graphs/more.json", "weights/999.safetensors", "weights/x", "tokenizer/chat.json"),
    *("onnx/program.json", "onnx/full.onnx", "native/period.so", "graphs/period.json", "é" * 70),
)


def of_zip(sound: Sound, chance: random.Random) -> tuple[str, bytes]:
    """The ZIP's own records: fields of the directory and of local headers, and what is around."""
    data = bytearray(sound.content)
    what = chance.randrange(7)
    if what == 0:
        return "cut", bytes(data[: chance.randrange(len(data))])
    if what == 1:
        return "more behind", bytes(data) + chance.randbytes(chance.randrange(1, 200))
    if what == 2:
        return "more before", chance.randbytes(chance.choice((1, 63, 64, 128))) + bytes(data)
    if what == 3:
        at, size = sorted(chance.randrange(len(data)) for _ in range(2))
        return "a part left out", bytes(data[:at] + data[size:])
    records = [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"]
    places = [place for mark in records for place in _places(data, mark)]
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.choice(places) + chance.randrange(46)
        layout = chance.choice(("<B", "<H", "<I"))
        if at + struct.calcsize(layout) <= len(data):
            (old,) = struct.unpack_from(layout, data, at)
            limit = 2 ** (8 * struct.calcsize(layout))
            new = chance.choice((0, 1, old + 1, old - 1, old ^ 64, limit - 1, limit // 2, old * 2))
            struct.pack_into(layout, data, at, new % limit)
    return "fields", bytes(data)


def _places(data: bytes | bytearray, mark: bytes) -> list[int]:
    found, at = [], data.find(mark)
    while at >= 0:
        found.append(at)
        at = data.find(mark, at + 1)
    return found


def of_zip64(sound: Sound, chance: random.Random) -> tuple[str, bytes]:
    """ZIPs of other writers: ZIP64 fields, comments, extra fields, duplicates, other flags."""
    names = list(sound.entries)
    out = BytesIO()
    victim = chance.choice(names)
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # of duplicate names
        for name in names:
            info = zipfile.ZipInfo(name)
            zip64 = 0
            if name == victim:
                match chance.randrange(6):
                    case 0:
                        info.external_attr = chance.choice((0o120777, 0o040755, 0o020644)) << 16
                    case 1:
                        info.comment = chance.randbytes(chance.choice((1, 100, 60_000)))
                    case 2:
                        archive.writestr(zipfile.ZipInfo(name), b"twice")
                    case 3:
                        info.compress_type = zipfile.ZIP_DEFLATED
                    case 4:
                        zip64 = 20
                    case _:
                        archive.comment = chance.randbytes(chance.choice((1, 65_000)))
            at = out.tell() + 30 + len(info.filename.encode()) + zip64 + 4
            info.extra = struct.pack("<HH", 0xD935, -at % 64) + bytes(-at % 64)
            with archive.open(info, "w", force_zip64=bool(zip64)) as file:
                file.write(sound.entries[name])
    return victim, out.getvalue()


def _damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes with some of them flipped, left out, repeated or in between."""
    own = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if not own:
            break
        at = chance.randrange(len(own))
        match chance.randrange(5):
            case 0:
                own[at] ^= 1 << chance.randrange(8)
            case 1:
                own[at] = chance.choice(b'\x00\xff"\\{}[],:-0e9.')
            case 2:
                del own[at : at + chance.choice((1, 2, 16, 500))]
            case 3:
                own[at:at] = own[at : at + chance.choice((1, 16, 500))]
            case _:
                own[at:at] = chance.choice((b"\xed\xa0\x80", b"1e999", b"9" * 5000, b"null", b'"'))
    return bytes(own)


KINDS: dict[str, tuple[Change, bool]] = {
    "manifest": (of_manifest, False),
    "graph": (of_graph, False),
    "inserted": (of_inserted, False),
    "inserted again": (of_inserted, False),
    "sizes": (of_sizes, False),
    "tokenizer": (of_tokenizer, False),
    "other JSON": (of_other_json, False),
    "weights": (of_weights, False),
    "bytes": (of_bytes, False),
    "entries": (of_entries, False),
    "ZIP": (of_zip, True),
    "ZIP64": (of_zip64, True),
}
"""By name: a change, and whether what loads after it says what it said."""
