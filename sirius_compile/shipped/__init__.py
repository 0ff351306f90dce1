"""Models that ship with the compiler, each a directory that `save_pretrained` wrote, by name.

`problems` generates the problems that `tally-3m` was trained on, and new ones to test it on.
"""
