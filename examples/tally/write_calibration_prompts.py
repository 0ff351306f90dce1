"""Writes the prompts that calibration of the shipped model starts from: training problems.

python examples/tally/write_calibration_prompts.py sirius_compile/shipped/tally-3m
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys

from sirius_compile.shipped.problems import Task, problems
from sirius_runtime.command_line import finish, path_argument
from sirius_runtime.new_file import write_file

COUNTS = {Task.REASONING: 48, Task.UNDERSTANDING: 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=path_argument, help="the model's directory")
    path = parser.parse_args().model / "calibration_prompts.jsonl"
    lines = [
        json.dumps({"prompt": problem.prompt})
        for task, count in COUNTS.items()
        for problem in itertools.islice(problems(task, "train", seed=1), count)
    ]
    write_file(path, "".join(f"{line}\n" for line in lines).encode())
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(finish("write_calibration_prompts.py", main))
