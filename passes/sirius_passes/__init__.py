"""The Program and the passes that rewrite it: one file and one class a pass.

`program` has the Program and the helpers that make nodes, `verifier` what must hold at each stage,
`manager` what a pass is and how passes run, `printer` graphs as text, `testing` the checker for
passes. `sirius_compile.pipeline` has the order.
"""
