"""The inside of the jail: run as a file by a Python of its own, it knows nothing of educe and needs the standard library alone.

It locks itself in, runs the answer, then the test behind it, and says how that ended on a pipe. Only the pass word, which came with
the job, counts as passed: what the answer prints, and how it ends, does not.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import itertools
import json
import math
import os
import pathlib
import platform
import random
import re
import resource
import string
import struct
import sys
import sysconfig
import types
import typing

_RULES = 444  # landlock_create_ruleset, _add_rule, _restrict_self: the same numbers on every architecture
_READ = 1 << 2 | 1 << 3  # files and directories
_ALL_V1 = (1 << 13) - 1  # every right over files of Landlock's first version
_NAMES_OF = {"x86_64": 0, "aarch64": 1}
_ARCH = (0xC000003E, 0xC00000B7)
# System calls that a test of a program needs never, on x86_64 and aarch64: processes, signals, sockets, other processes' memory,
# owners and modes of files (which Landlock leaves alone), their lengths (which it knows from its third version on), limits, the
# processor's turns, mounts, keys, the kernel itself.
_DENIED = {
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "sendto": (44, 206),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469), "truncate": (76, 45),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "mknod": (133, None), "mknodat": (259, 33),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "setrlimit": (160, 164), "prlimit64": (302, 261), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51),
    "pivot_root": (155, 41), "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "open_by_handle_at": (304, 265), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None), "quotactl": (179, 60),
}  # fmt: skip
_OPEN_FILES = "your files can be read and changed by it"
_OPEN_NETWORK = "the network can be reached by it, and processes started up to the limit"


def limit(job: dict[str, typing.Any]) -> None:
    """Limits that every POSIX system has; what a system lacks, or has lower, is left as it is."""
    wanted = {
        "RLIMIT_CPU": job["cpu_s"],
        "RLIMIT_AS": job["memory_bytes"],
        "RLIMIT_DATA": job["memory_bytes"],
        "RLIMIT_FSIZE": job["file_bytes"],
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,  # to root it means nothing
        "RLIMIT_CORE": 0,
    }
    for name, most in wanted.items():
        number = getattr(resource, name, None)
        if number is not None:
            hard = resource.getrlimit(number)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            try:
                resource.setrlimit(number, (most, most))
            except (ValueError, OSError):
                continue  # macOS knows RLIMIT_AS and refuses it


def lock(directory: str) -> list[str]:
    """What Linux offers to a process that locks itself in, without root. Returns what stays open, in words."""
    if sys.platform != "linux" or platform.machine() not in _NAMES_OF:
        return [_OPEN_FILES, _OPEN_NETWORK]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    shut_files, shut_calls = _landlock(libc, directory), _seccomp(libc, _NAMES_OF[platform.machine()])
    return [*([] if shut_files else [_OPEN_FILES]), *([] if shut_calls else [_OPEN_NETWORK])]


def _landlock(libc: ctypes.CDLL, directory: str) -> bool:
    """The standard library may be read, the job's own directory read and written, nothing else opened."""
    version = libc.syscall(_RULES, None, 0, 1)
    if version < 1:
        return False
    rights = _ALL_V1 | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    rules = libc.syscall(_RULES, struct.pack("Q", rights), 8, 0)
    if rules < 0:
        return False
    paths = sysconfig.get_paths()
    readable = {paths["stdlib"], paths["platstdlib"], "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"}
    for place, allowed in [*((p, _READ) for p in readable), (directory, rights & ~1)]:  # 1: to execute
        try:
            opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        libc.syscall(_RULES + 1, rules, 1, struct.pack("=Qi", allowed, opened), 0)
        os.close(opened)
    done: int = libc.syscall(_RULES + 2, rules, 0)
    os.close(rules)
    return done == 0


def _seccomp(libc: ctypes.CDLL, machine: int) -> bool:
    """A filter of system calls: those in the table fail with EPERM, calls of another architecture end the process."""
    numbers = [n for pair in _DENIED.values() if (n := pair[machine]) is not None]
    lines = [(0x20, 0, 0, 4), (0x15, 1, 0, _ARCH[machine]), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    lines += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, 0x80000000)]  # x32: the same calls under other numbers
    for number in numbers:
        lines += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | 1)]
    lines.append((0x06, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code))
    return bool(libc.prctl(22, 2, program, 0, 0) == 0)


def _kept() -> list[tuple[types.ModuleType, dict[str, typing.Any]]]:
    return [(m, dict(vars(m))) for m in list(sys.modules.values()) if isinstance(m, types.ModuleType)]


def _put_back(kept: list[tuple[types.ModuleType, dict[str, typing.Any]]]) -> None:
    """What the answer changed in modules that the test will use, builtins among them."""
    for module, was in kept:
        if module.__name__ != "__main__":
            now = vars(module)
            for name in [n for n in now if n not in was and not isinstance(now[n], types.ModuleType)]:
                del now[name]
            now.update(was)


def _run(code: str, name: str, names: dict[str, typing.Any]) -> str:
    """Why it failed; empty if it ran to its end."""
    try:
        exec(compile(code, name, "exec"), names)
    except SystemExit:
        return f"{name} ended the program"
    except BaseException as e:
        return f"{name}: {type(e).__name__}: {e}"[:300]
    return ""


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    out, write, end, dumps = int(sys.argv[1]), os.write, os._exit, json.dumps
    os.close(0)
    limit(job)
    still_open = lock(str(pathlib.Path.cwd()))
    write(out, (dumps({"open": still_open}) + "\n").encode())
    kept, put_back, settrace, setprofile = _kept(), _put_back, sys.settrace, sys.setprofile
    names = {"__name__": "answer", "__builtins__": __builtins__}
    failed = _run(job["answer"], "answer", names)
    settrace(None)
    setprofile(None)
    put_back(kept)
    failed = failed or _run(job["test"], "test", names)
    write(out, (dumps({"failed": failed} if failed else {"passed": job["word"]}) + "\n").encode())
    end(0)


_PRELOADED = (
    collections,
    functools,
    itertools,
    math,
    random,
    re,
    string,
)  # what tests use is kept before an answer runs

if __name__ == "__main__":
    main()
