"""Make system call filters, as the bytes of a BPF program.

`allowed_calls` lists what a Python program may do and refuses everything else. The Landlock backend rests on it, since
no namespace hides the rest of the machine there. `refused_calls` lists a few calls that bubblewrap's namespaces leave
open: kernel memory that no limit counts (System V segments, memory files) and interfaces that a program does not need.
"""

from __future__ import annotations

import errno
import fcntl
import platform
import struct
import tempfile
import termios
from functools import cache
from typing import Any

# The calls of an interpreter that reads, computes, starts threads and prints. Left out on purpose: sockets; fork, kill
# and similar calls, so that a program is one process; calls that change a file without opening it (chmod, chown,
# truncate, xattr, utime), which Landlock does not see; calls that act on another process of the same user (ptrace,
# process_vm_*, pidfd_*, sched_set*, setpriority); memory that outlives the program or evades the limits.
_ALLOWED_TEXT = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range
    open openat openat2 stat fstat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat
    getdents getdents64 getcwd chdir fchdir statfs fstatfs umask
    pipe pipe2 dup dup2 dup3 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait
    epoll_pwait2 eventfd2 flock fsync fdatasync
    mmap mprotect munmap mremap madvise msync mincore brk membarrier
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack restart_syscall
    pause alarm setitimer getitimer timer_create timer_settime timer_gettime timer_delete timer_getoverrun
    nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getrusage
    getpid getppid gettid getuid geteuid getgid getegid getpgrp getpgid getsid getgroups getresuid getresgid
    uname sysinfo getrandom getrlimit getcpu sched_yield sched_getaffinity sched_getparam sched_getscheduler
    sched_get_priority_max sched_get_priority_min
    futex futex_waitv set_robust_list get_robust_list set_tid_address rseq arch_prctl
    execve exit exit_group wait4 waitid
"""
ALLOWED = tuple(_ALLOWED_TEXT.split())

# fcntl with F_SETOWN and ioctl with FIOSETOWN would have the kernel send a signal to any process of the same user.
FCNTL_ALLOWED = (
    fcntl.F_DUPFD,
    fcntl.F_DUPFD_CLOEXEC,
    fcntl.F_GETFD,
    fcntl.F_SETFD,
    fcntl.F_GETFL,
    fcntl.F_SETFL,
    fcntl.F_GETLK,
    fcntl.F_SETLK,
    fcntl.F_SETLKW,
)
IOCTL_ALLOWED = ("TCGETS", "TIOCGWINSZ", "FIONREAD", "FIOCLEX", "FIONCLEX")  # in termios; numbers differ by machine
PRCTL_ALLOWED = (15, 16)  # PR_SET_NAME and PR_GET_NAME, which threads call
CLONE_THREAD = 0x00010000

# By machine: the audit architecture, and the numbers of the calls that `refused_calls` refuses.
_REFUSED: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "shmget": 29,
            "socket": 41,
            "semget": 64,
            "msgget": 68,
            "mq_open": 240,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "unshare": 272,
            "perf_event_open": 298,
            "memfd_create": 319,
            "bpf": 321,
            "userfaultfd": 323,
            "io_uring_setup": 425,
            "memfd_secret": 447,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "unshare": 97,
            "mq_open": 180,
            "msgget": 186,
            "semget": 190,
            "shmget": 194,
            "socket": 198,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "perf_event_open": 241,
            "memfd_create": 279,
            "bpf": 280,
            "userfaultfd": 282,
            "io_uring_setup": 425,
            "memfd_secret": 447,
        },
    ),
}
_X32_BIT = 0x40000000  # marks the second set of call numbers of x86-64

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF: ld [k], jeq, jge, ret
_ARCHITECTURE_OFFSET, _NUMBER_OFFSET = 4, 0  # in struct seccomp_data
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000


def refused_calls(machine: str | None = None) -> bytes | None:
    """Make a filter that refuses a few calls and kills a program of another architecture; None for unknown machines.

    >>> len(refused_calls("x86_64")) // 8
    22
    """
    machine = platform.machine() if machine is None else machine
    if machine not in _REFUSED:
        return None
    architecture, calls = _REFUSED[machine]
    numbers = sorted(calls.values())
    to_refuse = len(numbers) + 1  # instructions from the test of the x32 bit to `refuse`
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_OFFSET),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        (_AT_LEAST, to_refuse, 0, _X32_BIT),
        *((_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


@cache
def allowed_calls() -> bytes:
    """Make a filter that allows the calls in ALLOWED and no others.

    The others fail with ENOSYS rather than EPERM, so that a C library newer than this list falls back to older calls.

    Raises:
        ImportError: pyseccomp is not installed.
        RuntimeError: libseccomp is missing or cannot make the filter.
    """
    import pyseccomp  # late: it runs a compiler and a linker to find libseccomp, which is slow

    rules: list[tuple[str, tuple[Any, ...]]] = [(name, ()) for name in ALLOWED]
    rules += [("fcntl", (pyseccomp.Arg(1, pyseccomp.EQ, command),)) for command in FCNTL_ALLOWED]
    rules += [("ioctl", (pyseccomp.Arg(1, pyseccomp.EQ, getattr(termios, name)),)) for name in IOCTL_ALLOWED]
    rules += [("prctl", (pyseccomp.Arg(0, pyseccomp.EQ, command),)) for command in PRCTL_ALLOWED]
    rules += [("prlimit64", (pyseccomp.Arg(0, pyseccomp.EQ, 0),))]  # of the process itself only
    rules += [("clone", (pyseccomp.Arg(0, pyseccomp.MASKED_EQ, CLONE_THREAD, CLONE_THREAD),))]
    try:
        filter_ = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
        for name, arguments in rules:
            # A negative number means that the call is unknown or does not exist on this machine.
            if pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) >= 0:
                filter_.add_rule(pyseccomp.ALLOW, name, *arguments)
        with tempfile.TemporaryFile() as file:
            filter_.export_bpf(file)
            file.seek(0)
            return file.read()
    except OSError as error:
        raise RuntimeError(f"libseccomp could not make the filter: {error}") from error
