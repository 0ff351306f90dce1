#!/usr/bin/env bash
# Guards the graphs of your own model in CI: the first run writes them, later runs fail with a readable
# diff when a new version of torch, transformers or sirius-compile changes what your model compiles to.
#
#   examples/guard_graphs.sh MODEL GRAPHS_DIR [flags of sirius-compile]
#
# Commit GRAPHS_DIR. When a change is wanted, delete it, run this again and commit the new graphs.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: examples/guard_graphs.sh MODEL GRAPHS_DIR [flags of sirius-compile]" >&2
    exit 2
fi
model=$1 graphs=$2
shift 2
artifact=$(mktemp -d)/model.sirius
trap 'rm -rf "$(dirname "$artifact")"' EXIT
if [ -d "$graphs" ]; then
    sirius-compile "$model" --out "$artifact" --expect-graphs "$graphs" "$@"
else
    sirius-compile "$model" --out "$artifact" --dump-graphs "$graphs" "$@"
    echo "wrote the graphs of $model to $graphs: commit them"
fi
