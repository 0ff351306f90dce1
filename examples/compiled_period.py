"""Compile the shipped model, then run each period as one compiled call (AOTInductor, needs g++).

    python examples/compiled_period.py

The first run builds the period's machine code, which takes a minute; later runs reuse it.
"""

import sirius_runtime
from sirius_compile import CompileConfig, compile_model

PROMPT = "Q: Zoe has 25 nuts. Bob has 20 fewer than Zoe. How many nuts does Bob have?\nA:"

compiled = compile_model("tally-3m", CompileConfig(sparsity="griffin", period=8, tree_width=2))
compiled.save("tally-period.sirius", force=True)
for backend in ("eager", "aoti"):
    model = sirius_runtime.load("tally-period.sirius", backend=backend, context=192)
    for _ in range(2):  # the first call pays for allocation
        output = model.generate(PROMPT, mode="exact", fallback=False)
    print(f"{backend:6}{output.stats.tokens_per_second:8.0f} tokens/s {output.texts[0]!r}")
