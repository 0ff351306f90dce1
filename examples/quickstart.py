"""Compile the shipped model in memory, and watch the three paths answer one question."""

from sirius_compile import CompileConfig, compile_model
from sirius_compile.shipped.problems import Task, problems
from sirius_runtime import Mode

model = compile_model("tally-3m", CompileConfig(sparsity="griffin", keep=0.4)).to_runtime()
problem = next(problems(Task.REASONING, "test", seed=3))

print(problem.prompt + problem.answer, end="\n\n")
for mode in (Mode.FULL, Mode.SPARSE, Mode.SIRIUS):
    # This small model fits in the CPU's cache, where drafting saves no time: draft nevertheless.
    output = model.generate(problem.prompt, mode=mode, max_new_tokens=110, fallback=False)
    print(f"--- {mode}, {output.stats.corrections} corrections ---{output.texts[0]}", end="\n\n")
