"""GPU leases: all of the devices asked for or none, held by file lock.

Owns which devices the caller may see and who holds them. Must not know torch or CUDA: nothing here
may create a context. Easy to get wrong: two requests that each hold half of the machine; a gate
lets one request gather at a time, and a holder never asks for more without releasing first.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from parity.errors import InfrastructureError, UsageError

POLL_S = 0.05


class DeviceUnavailableError(InfrastructureError):
    """Fewer devices exist, or came free in time, than a gang needs."""


def count_devices(dev: Path = Path("/dev")) -> int:
    """Count the NVIDIA device nodes without a driver call or a CUDA context."""
    return sum(1 for node in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", node.name))


def visible_devices(
    environ: Mapping[str, str], count: Callable[[], int] = count_devices
) -> tuple[str, ...]:
    """List the devices a caller may use, as CUDA_VISIBLE_DEVICES would name them.

    CUDA reads that variable up to the first entry it does not know; -1 or an empty one hides all.

    Args:
        environ: the caller's environment.
        count: number of devices where the variable is not set.
    """
    text = environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return tuple(str(index) for index in range(count()))
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if not re.fullmatch(r"\d+|(GPU|MIG)-.+", name) or name in names:
            break
        names.append(name)
    return tuple(names)


def default_directory() -> Path:
    """Give the folder of the locks that all users of this machine share."""
    return Path(tempfile.gettempdir()) / "foldparity-gpu-leases"


@dataclass
class Lease:
    """Devices held until `release`; `devices` are in the caller's visible order."""

    devices: tuple[str, ...]
    _locks: list[FileLock] = field(default_factory=list, repr=False)

    def release(self) -> None:
        """Give every device back; a second call does nothing."""
        while self._locks:
            self._locks.pop().release()

    def __enter__(self) -> Lease:
        """Hold the devices for a block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the devices back."""
        self.release()


def lease(
    num_devices: int,
    visible: Sequence[str],
    *,
    timeout_s: float = 600.0,
    directory: Path | None = None,
) -> Lease:
    """Hold `num_devices` of the visible devices at once, waiting until they are free.

    Requests are served one after another, so a large one is not starved by small ones. The caller
    must hold no other lease: a holder that waits for more would wait for itself.

    Raises:
        UsageError: the number is not positive.
        DeviceUnavailableError: too few are visible, or not enough came free in time.
    """
    if num_devices < 1:
        raise UsageError(f"a lease needs at least one device (got {num_devices})")
    if num_devices > len(visible):
        raise DeviceUnavailableError(
            f"{num_devices} devices needed, {len(visible)} visible ({', '.join(visible) or 'none'})"
        )
    folder = _shared(directory or default_directory())
    deadline = time.monotonic() + timeout_s
    held: dict[str, FileLock] = {}
    try:
        with _gate(folder, timeout_s):
            for _ in _until(deadline):
                _gather(held, num_devices, visible, folder)
                if len(held) == num_devices:
                    names = tuple(name for name in visible if name in held)
                    return Lease(names, [held.pop(name) for name in names])
        raise DeviceUnavailableError(
            f"{num_devices} of the devices {', '.join(visible)} did not come free in "
            f"{timeout_s:g} s; {len(held)} were free"
        )
    finally:
        for lock in held.values():
            lock.release()


def _shared(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # another user made it, open to all already
        os.chmod(folder, 0o1777)
    return folder


def _lock(folder: Path, name: str) -> FileLock:
    return FileLock(folder / f"{name}.lock", mode=0o666, thread_local=False)


@contextlib.contextmanager
def _gate(folder: Path, timeout_s: float) -> Iterator[None]:
    gate = _lock(folder, "gate")
    try:
        gate.acquire(timeout=timeout_s, poll_interval=POLL_S)
    except Timeout as error:
        raise DeviceUnavailableError(
            f"other requests for devices were not served in {timeout_s:g} s"
        ) from error
    try:
        yield
    finally:
        gate.release()


def _until(deadline: float) -> Iterator[None]:
    while True:
        yield
        if time.monotonic() >= deadline:
            return
        time.sleep(POLL_S)


def _gather(
    held: dict[str, FileLock], num_devices: int, visible: Sequence[str], folder: Path
) -> None:
    """Add free devices to those held, in visible order, until there are enough."""
    for name in visible:
        if len(held) == num_devices:
            return
        if name in held:
            continue
        lock = _lock(folder, f"gpu-{name.replace('/', '_')}")
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            held[name] = lock
