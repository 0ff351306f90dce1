"""The child process for an answer's program: it limits itself, then runs the program.

`execution` runs this file as a script, with the order (a JSON object) on stdin; it imports nothing
of this package. Resource limits (`setrlimit`) bound memory, CPU seconds, open files and file sizes.
A filter of system calls (seccomp) forbids starting or signalling processes, opening sockets, and
changing the file system; the program may read files. It can undo neither.

When the program ends, writes the order's secret word to stdout and then, if it failed, the reason.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

# Numbers of the refused system calls (linux/include/uapi/asm-generic/unistd.h and
# arch/x86/entry/syscalls/syscall_64.tbl). The kernel never reuses a number.
_REFUSED = {
    "x86_64": {
        "processes, and limits": "57 58 59 101 105 106 109 112 113 114 117 119 135 141 144 160 203 "
        "251 272 302 308 310 311 312 314 322 434 438 440",
        "signals": "62 129 200 234 297 424",
        "sockets, and rings that make them": "41 53 425 426 427",
        "changes of files": "16 76 77 82 83 84 85 86 87 88 90 91 92 93 94 132 133 188 189 190 197 "
        "198 199 235 253 258 259 260 261 263 264 265 266 268 280 285 294 300 304 316 319 437 447",
        "memory and queues that processes share": "29 30 31 64 65 66 68 69 71 220 240 241 248 249 "
        "250",
        "the system": "103 153 155 159 161 163 164 165 166 167 168 169 170 171 172 173 175 176 179 "
        "212 227 246 298 305 313 317 320 321 323 428 429 430 431 432 433 442 443",
    },
    "aarch64": {
        "processes, and limits": "30 92 97 117 119 122 140 143 144 145 146 147 149 154 157 164 221 "
        "261 268 270 271 272 274 281 434 438 440",
        "signals": "129 130 131 138 240 424",
        "sockets, and rings that make them": "198 199 425 426 427",
        "changes of files": "5 6 7 14 15 16 26 29 33 34 35 36 37 38 45 46 47 52 53 54 55 88 262 "
        "265 276 279 437 447",
        "memory and queues that processes share": "180 181 186 187 189 190 191 192 193 194 195 196 "
        "217 218 219",
        "the system": "18 39 40 41 51 58 60 89 104 105 106 112 116 142 161 162 170 171 224 225 241 "
        "266 273 277 280 282 294 428 429 430 431 432 433 442 443",
    },
}
_FIRST_UNKNOWN = 451  # calls newer than this table fail with ENOSYS, as if they did not exist
_OPEN, _OPENAT = {"x86_64": 2}, {"x86_64": 257, "aarch64": 56}
_CLONE, _CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of BPF
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_REFUSE, _MISSING = _ERRNO | 13, _ERRNO | 38  # EACCES, ENOSYS
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_THREAD = 0x00010000  # CLONE_THREAD
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # of prctl

_FILE_BYTES = 2**20
UNLIMITED = "this system can't limit it"


def main() -> None:
    order = json.loads(sys.stdin.buffer.read())
    told = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    _limit(**order["limits"])
    if not _filter_system_calls():
        told.write(f"{order['word']}\n{UNLIMITED}")
        told.flush()
        os._exit(0)
    reason = _run(order["program"])
    told.write(f"{order['word']}\n{reason}")
    told.flush()
    os._exit(0)  # without the program's exit handlers


def _run(program: str) -> str:
    """Runs the program; returns why it failed, or "" if it ran to its end."""
    try:
        exec(compile(program, "answer", "exec"), {"__name__": "__main__"})
    except SystemExit:
        return "exited before its end"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200].replace("\n", " ")
    return ""


def _limit(seconds: float, memory: int, files: int) -> None:
    cpu = max(1, round(seconds))
    for what, most in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_NPROC, 0),  # does not bind root; the filter does
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    # A timer of its own, in case the parent dies.
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _filter_system_calls() -> bool:
    """Installs the filter; returns whether it is active."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _REFUSED or sys.byteorder != "little":
        return False
    code = b"".join(struct.pack("=HBBI", *line) for line in _program(machine))
    filters = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(filters))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    if prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    address = ctypes.create_string_buffer(program, len(program))
    return prctl(_SET_SECCOMP, _FILTER, ctypes.addressof(address), 0, 0) == 0


def _program(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter as BPF instructions: (operation, jump if true, jump if false, operand)."""
    lines = [
        (_LOAD, 0, 0, _ARCH),
        (_IF_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_IF_AT_LEAST, 0, 1, _FIRST_UNKNOWN),  # also the calls of x86's x32 ABI
        (_RETURN, 0, 0, _MISSING),
        (_IF_EQUAL, 0, 1, _CLONE3),  # the C library then uses `clone`, whose flags a filter can see
        (_RETURN, 0, 0, _MISSING),
    ]
    for group in _REFUSED[machine].values():
        for number in map(int, group.split()):
            lines += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    for opens, argument in ((_OPEN.get(machine), 1), (_OPENAT[machine], 2)):
        if opens is not None:
            lines += [
                (_IF_EQUAL, 0, 4, opens),
                (_LOAD, 0, 0, _ARGUMENTS + 8 * argument),
                (_IF_ANY_BIT, 0, 1, _WRITES),
                (_RETURN, 0, 0, _REFUSE),
                (_RETURN, 0, 0, _ALLOW),
            ]
    lines += [
        (_IF_EQUAL, 0, 3, _CLONE[machine]),
        (_LOAD, 0, 0, _ARGUMENTS),
        (_IF_ANY_BIT, 1, 0, _THREAD),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return lines


if __name__ == "__main__":
    main()
