"""A plugin of pytest, and a module of children: from here on, kernels have AddressSanitizer.

It sees what is read or written beyond a tensor, a buffer between kernels or an array on the stack.
Blocks of columns are checked by assertions too, which the build for use leaves out.
"""

from __future__ import annotations

from sirius_runtime.kernels import build

FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-UNDEBUG", "-fsanitize=address")

build._FLAGS = (*build._FLAGS, *FLAGS)
