"""The Program and the passes that rewrite it: one file and one class a pass.

`program` has the Program and helpers that make nodes. `verifier` checks the invariants of each
stage. `manager` defines a pass and runs passes. `printer` prints graphs as text. `testing` checks a
pass in tests. The order of passes is in `sirius_compile.pipeline`.
"""
