"""Which device and arithmetic: decided by a timed matmul, not by a table, and said."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from educe.errors import MachineError

_SIZE = 1024
_PROBE_S = 0.25
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What to compute on. `flops` is what the probe reached (multiply and add counted as two), `why` says so in words.
    `memory_bytes`: of one that is planned for and not here."""

    kind: str
    dtype: str
    name: str
    flops: float
    why: str
    memory_bytes: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def choose_device(device: str = "auto", dtype: str = "auto") -> Device:
    """The fastest device there is and the faster arithmetic on it; either can be fixed. Takes about a second."""
    present = [k for k, there in (("cuda", torch.cuda.is_available()), ("mps", _mps()), ("cpu", True)) if there]
    if device != "auto" and device not in present:
        found = f"{device} is not available; here: {', '.join(present)}."
        raise MachineError(5, "device", found, "Set device: auto, or install the torch build for it.")
    kind = device if device != "auto" else present[0]
    if kind == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    rates = {d: _rate(kind, DTYPES[d]) for d in (DTYPES if dtype == "auto" else [dtype])}
    chosen = max(rates, key=lambda d: rates[d])
    shown = ", ".join(f"{d} {r / 1e12:.2f} TFLOP/s" for d, r in rates.items())
    return Device(kind=kind, dtype=chosen, name=_name(kind), flops=rates[chosen], why=f"timed matmul: {shown}")


def _mps() -> bool:
    return bool(torch.backends.mps.is_available())


def _rate(kind: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matmul; 0 where the device cannot do the arithmetic."""
    size = _SIZE if kind == "cpu" else 4 * _SIZE
    try:
        a = torch.randn(size, size, device=kind).to(dtype)
        _wait(a @ a, kind)
        rounds, started = 0, time.perf_counter()
        while time.perf_counter() - started < _PROBE_S:
            _wait(a @ a, kind)
            rounds += 1
        return 2.0 * size**3 * rounds / (time.perf_counter() - started)
    except (RuntimeError, TypeError):
        return 0.0


def _wait(result: torch.Tensor, kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()
    elif kind == "mps":
        torch.mps.synchronize()
    else:
        result[0, 0].item()


def _name(kind: str) -> str:
    if kind == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{torch.get_num_threads()} CPU threads" if kind == "cpu" else "Apple GPU"


def peak_memory_bytes(kind: str) -> int:
    """The most memory this process has held: on the GPU where there is one, else resident memory."""
    if kind == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the process that started this one held
        peak = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if peak is not None:
            return int(peak.split()[1]) * 1024
    try:
        import resource
        import sys

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024
    except ImportError:  # Windows keeps the peak in psutil
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", psutil.Process().memory_info().rss))


def forget_peak_memory() -> None:
    """`peak_memory_bytes` counts from here on, where that can be had: a stage's peak is not that of the stage before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux: proc_pid_clear_refs(5); elsewhere the peak is the process's
        Path("/proc/self/clear_refs").write_text("5")


# For what answers with a finished run's model: of its recipe nothing can be changed now.
CLOSE_OTHERS = "Close other programs on it, or use a device with more memory."


@contextlib.contextmanager
def told_of_memory(
    doing: str, fix: str = "Close other programs on it, set tuning.kind: lora, or lower train.micro_batch_tokens."
) -> Iterator[None]:
    """Where the device's memory ends within, `MachineError` says so, and `fix`."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise MachineError(3, doing, f"{str(e).split('. ')[0]}.", fix) from e


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """With `on`, a GPU gives the same bits on every run within; what it has no such way of computing is a `MachineError`. Before
    anything has run on it: cuBLAS takes its workspace once (docs.nvidia.com/cuda/cublas, "Results reproducibility")."""
    before = torch.are_deterministic_algorithms_enabled()
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    try:
        yield
    except RuntimeError as e:
        if "deterministic" not in str(e):
            raise
        found = f"is true, and on this device there is no such way: {str(e).splitlines()[0][:200]}"
        raise MachineError(5, "train.deterministic", found, "Set it to false, or train on another device.") from e
    finally:
        torch.use_deterministic_algorithms(before)


def free_host_memory() -> int:
    """Bytes that this process may still take: what the system has, or what its container or batch job may."""
    free = int(psutil.virtual_memory().available)
    for group in _groups():
        try:
            most, used = ((group / f"memory.{n}").read_text(encoding="utf-8").strip() for n in ("max", "current"))
            files = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(encoding="utf-8"), re.M)
        except OSError:
            continue
        if most != "max":
            free = min(free, int(most) - int(used) + (int(files[1]) if files else 0))
    return max(free, 0)


def _groups() -> list[Path]:
    """Directories of this process's control group and those above it (Linux, docs.kernel.org, "Control Group v2")."""
    try:
        line = next(
            x for x in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines() if x.startswith("0::")
        )
    except (OSError, StopIteration):
        return []
    own = Path("/sys/fs/cgroup") / line.removeprefix("0::").lstrip("/")
    return [own, *own.parents[: len(own.parts) - 3]]


def release_free_memory() -> None:
    """Give freed heap back to the system, where the C library can (glibc): it fragments, and resident memory would creep up."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
