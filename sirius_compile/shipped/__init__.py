"""Models that ship with the compiler, each a directory that `save_pretrained` wrote, by name.

`problems` makes the problems that `tally-3m` was trained on, and fresh ones to test it with.
"""
