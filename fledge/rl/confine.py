"""What a process that judges answers gives up before it looks at one: limits, and a filter of its system calls.

The filter (seccomp) forbids sockets, new processes and threads, signals to others, tracing, and every change of a file;
reading stays possible, but for what is sealed. It cannot be undone, asks for no privilege, and needs Linux on x86-64 or
64-bit ARM. Imports nothing but the standard library.

Source: seccomp(2), setrlimit(2), bpf's classic instructions as in linux/filter.h, the kernel's tables of system calls.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import platform
import resource
import struct

# System calls by number: (x86_64, aarch64; None: the machine has no such call).
NETWORK = {"socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "io_uring_setup": (425, 425)}
PROCESSES = {
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_open": (434, 434),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "prlimit64": (302, 261), "bpf": (321, 280),
    "mount": (165, 40), "unshare": (272, 97), "setns": (308, 268), "keyctl": (250, 219), "shmget": (29, 194),
}  # fmt: skip
FILES = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "truncate": (76, 45),
    "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "mkdir": (83, None), "mkdirat": (258, 34), "mknod": (133, None), "mknodat": (259, 33), "creat": (85, None),
    "openat2": (437, 437),
}  # fmt: skip
# What tells of files without changing them; forbidden to what is sealed, together with opening any.
READS = {
    "open": (2, None), "openat": (257, 56), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78),
    "statfs": (137, 43), "getxattr": (191, 8), "lgetxattr": (192, 9), "listxattr": (194, 11), "llistxattr": (195, 12),
    "getcwd": (79, 17), "chdir": (80, 49),
}  # fmt: skip
OPENS = {"open": ((2, None), 1), "openat": ((257, 56), 2)}  # and which argument holds the flags
O_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# struct sock_filter: code, jump if true, jump if false, k.
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
AT_NUMBER, AT_ARCHITECTURE, AT_ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
FOREIGN_ABI = 0x40000000  # x32 numbers the same calls from here
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2


def limit(*, seconds: float, memory_bytes: int) -> None:
    """Bounds on this process: CPU seconds, address space, open files; no core dump and no file that grows."""
    for kind, value in (
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_FSIZE, 1 << 20),  # bytes; what is written lies in memory
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def can_filter() -> bool:
    """This machine's system calls are known here. Whether its kernel agrees, `filter_calls` finds out."""
    return platform.system() == "Linux" and platform.machine() in ARCHITECTURES


def filter_calls(*, is_sealed: bool = False) -> None:
    """Forbid what the tables above name, for good; if sealed, every look at a file too. OSError if it is refused."""
    program = _program(*ARCHITECTURES[platform.machine()], is_sealed=is_sealed)
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a number of instructions, padded to a pointer, and where they are.
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0),
    ):
        if prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _program(column: int, architecture: int, *, is_sealed: bool) -> bytes:
    """The filter as classic BPF: calls of another architecture kill, forbidden ones fail with EPERM."""
    lines = [
        (LOAD, 0, 0, AT_ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, AT_NUMBER),
        (JUMP_AT_LEAST, 0, 1, FOREIGN_ABI),
        (RETURN, 0, 0, DENY),
    ]
    reads = READS.values() if is_sealed else ()
    for numbers in (*NETWORK.values(), *PROCESSES.values(), *FILES.values(), *reads):
        if (number := numbers[column]) is not None:
            lines += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, DENY)]
    for numbers, argument in OPENS.values():
        if (number := numbers[column]) is not None:
            lines += [
                (JUMP_EQUAL, 0, 4, number),
                (LOAD, 0, 0, AT_ARGUMENTS + 8 * argument),
                (JUMP_SET, 0, 1, O_CHANGES),
                (RETURN, 0, 0, DENY),
                (LOAD, 0, 0, AT_NUMBER),
            ]
    lines.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in lines)
