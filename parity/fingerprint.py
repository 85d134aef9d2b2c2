"""What a run ran on: commit, versions, devices, environment.

Owns every question put to the machine. Must not import torch: versions come from package
metadata, GPUs from the driver's own tool. Easy to get wrong: a run outside any repository, or in
one without a commit, is still a run.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("foldparity", "torch", "deepspeed", "numpy", "pydantic", "pytest")
_VARIABLES = ("CUDA_", "DEEPSPEED_", "DS_", "GLOO_", "MKL_", "NCCL_", "OMP_", "TORCH_")
_TOOL_LIMIT_S = 10.0
"""Longest wait for git or the driver's tool; a wedged driver must not hang a run."""
NOTED_SHARE = 0.2
"""Share of the cores' time kept by the host from which on it is said."""


def commit(folder: Path | None = None) -> str:
    """Give the short commit of the repository around `folder`, with `-dirty`, or `nocommit`."""
    here = str(folder or Path.cwd())
    name = _ask("git", "-C", here, "rev-parse", "--short=9", "--verify", "HEAD")
    if not name:
        return "nocommit"
    changed = _ask("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return f"{name}-dirty" if changed else name


def versions(others: Iterable[str] = ()) -> dict[str, str | None]:
    """Give the version of Python, of each package that matters and of others; None: none here."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in dict.fromkeys((*PACKAGES, *sorted(others))):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def cores() -> int:
    """Count the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class HostClock:
    """Tells how much of the cores' time a virtual machine's host has kept since this was made."""

    def __init__(self) -> None:
        """Begin to count."""
        self._start, self._stolen_s = time.monotonic(), _stolen_s()

    def share(self) -> float:
        """Give the kept share of all cores' time, 0 to 1; 0 where the system does not say."""
        passed_s = (time.monotonic() - self._start) * (os.cpu_count() or 1)
        return min(1.0, (_stolen_s() - self._stolen_s) / passed_s) if passed_s else 0.0

    def note(self) -> str:
        """Say so where times and deadlines mean little: above NOTED_SHARE; else nothing."""
        share = self.share()
        return f"the host kept {share:.0%} of the cores' time" if share > NOTED_SHARE else ""


def gpus() -> list[str]:
    """Name the GPUs the driver shows, with their memory."""
    query = "--query-gpu=name,memory.total,driver_version"
    return _ask("nvidia-smi", query, "--format=csv,noheader").splitlines()


def visible_gpus() -> tuple[str, ...]:
    """List the GPUs this process was given, as CUDA_VISIBLE_DEVICES names them."""
    from parity.devices import visible_devices

    return visible_devices(os.environ)


def devices() -> dict[str, Any]:
    """Describe the machine; its name only as a hash, enough to tell two machines apart."""
    return {
        "machine": hashlib.sha256(platform.node().encode()).hexdigest()[:8],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_bytes": _memory_bytes(),
        "gpus": gpus(),
    }


def environment() -> dict[str, str]:
    """Give the variables that change what ranks compute or how they talk."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)}


def fingerprint(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Take all of it, for run.json, with the versions of further packages."""
    return {
        "commit": commit(),
        "versions": versions(packages),
        "devices": devices(),
        "environment": environment(),
        "executable": sys.executable,
    }


def _ask(*command: str) -> str:
    """Run a small tool; its output, or nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_TOOL_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _stolen_s() -> float:
    """Give the core-seconds since boot that ready processes waited for the host."""
    try:
        ticks = int(Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)[8])
    except (OSError, ValueError, IndexError):  # proc(5) has it since Linux 2.6.11
        return 0.0
    return ticks / os.sysconf("SC_CLK_TCK")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # not every system knows these names
        return None
