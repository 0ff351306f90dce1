"""Drive an exported period.onnx with ONNX Runtime alone, as a port to another language would.

sirius-compile tally-3m --sparsity griffin --period 8 --graphs both --out tally.sirius
sirius export-onnx tally.sirius tally-onnx
python examples/onnx_minimal.py tally-onnx "Q: Zoe has 25 nuts. How many nuts does Zoe have?\\nA:"
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

if len(sys.argv) != 3 or not Path(sys.argv[1], "program.json").is_file():
    sys.exit("usage: onnx_minimal.py FOLDER PROMPT, of a folder that `sirius export-onnx` wrote")
folder, prompt, slots = Path(sys.argv[1]), sys.argv[2].replace("\\n", "\n"), 512
about = json.loads((folder / "program.json").read_text())
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))


def graph(name):
    """A graph as a function of named arrays; it ignores arrays that the graph does not read."""
    session = ort.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    reads, makes = ([v.name for v in vs] for vs in (session.get_inputs(), session.get_outputs()))
    return lambda given: dict(zip(makes, session.run(makes, {n: given[n] for n in reads})))


def write(block, at):
    """A block's K/V to its cache slots: [layers, rows, heads, slots, head_dim]."""
    for cache, new in zip((state["k_cache"], state["v_cache"]), block, strict=True):
        cache[:, :, :, at : at + new.shape[3]] = new


# 1. Prefill. In griffin it also gives the statistic of neurons: `select` gathers their weights.
ids, own = np.array([tokenizer.encode(prompt).ids]), about["state"]
T, shape = ids.shape[1], (own["layers"], 1, own["kv_heads"], slots)
state = {f"{n[0]}_cache": np.zeros((*shape, own[n]), "float32") for n in ("key_dim", "value_dim")}
state |= {"input_ids": ids, "positions": np.arange(T)[None], "length": np.array([0])}
state |= {"valid": np.ones((1, T), bool), "last": np.array([T - 1])}
state["tree_mask"] = np.maximum(np.arange(T)[:, None] - np.arange(T), -1)[None]
found = graph("prefill")(state)
write((found["k_new"], found["v_new"]), 0)
state |= {"length": np.array([T]), "root": found["logits"][0].argmax(-1)}
state |= graph("select")(found) | {"statistic": found["statistic"]} if about["kept"] else {}
# 2. Periods: the sparse path drafts, the full path keeps tokens that are its own choice (rule 1).
size, tokens, ends = about["period"]["period"], state["root"].tolist(), set(about["eos_token_ids"])
numbers = {"threshold": 0, "verify_temperature": 1, "confidence": 0, "temperature": 1, "top_p": 1}
state |= {name: np.array(value, np.float32) for name, value in numbers.items()}
state |= {"rule": np.array(1), "top_k": np.array(0), "most": np.array([size])}
state["active"], state["noise"], period = np.array([True]), np.zeros((1, 2, size)), graph("period")
while not ends & set(tokens) and T + len(tokens) + size < slots:
    found = period(state)
    write((found["k_kept"], found["v_kept"]), state["length"][0])
    tokens += found["tokens"][0, : found["advance"][0]].tolist()
    state |= {k.removeprefix("next_"): v for k, v in found.items() if k.startswith("next_")}
whole = [*ids[0], *tokens[: next((i for i, t in enumerate(tokens) if t in ends), None)]]
print(tokenizer.decode(whole).removeprefix(tokenizer.decode(ids[0])))  # keeps its first space
