"""GPU leases on invented device names: no GPU is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from parity.devices import DeviceUnavailableError, count_devices, lease, visible_devices
from parity.errors import UsageError

FOUR = ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0,1", ("0", "1")),
        (" 2 , 0", ("2", "0")),
        ("GPU-1a2b,MIG-3c", ("GPU-1a2b", "MIG-3c")),
        ("", ()),
        ("-1", ()),
        ("0,-1,1", ("0",)),
        ("0,0", ("0",)),
    ],
)
def test_variable_is_read_as_cuda_reads_it(text: str, names: tuple[str, ...]) -> None:
    """Order is kept and everything after the first unknown or repeated entry is hidden."""
    assert visible_devices({"CUDA_VISIBLE_DEVICES": text}, count=lambda: 8) == names


def test_all_devices_are_visible_without_the_variable() -> None:
    """Where the caller has chosen nothing, every device of the machine counts."""
    assert visible_devices({}, count=lambda: 3) == ("0", "1", "2")


def test_count_takes_gpu_nodes_only(tmp_path: Path) -> None:
    """Control nodes beside the GPUs are not counted."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert count_devices(tmp_path) == 2


def test_lease_takes_the_first_free_devices_in_visible_order(tmp_path: Path) -> None:
    """A second lease gets what the first left."""
    with lease(2, ("3", "1", "0"), directory=tmp_path) as first:
        assert first.devices == ("3", "1")
        with lease(1, ("3", "1", "0"), directory=tmp_path) as second:
            assert second.devices == ("0",)


def test_lease_that_cannot_be_whole_holds_nothing(tmp_path: Path) -> None:
    """Two of three free devices are given back at once when three are asked for in vain."""
    with lease(2, FOUR, directory=tmp_path):
        with pytest.raises(DeviceUnavailableError, match="2 were free"):
            lease(3, FOUR, timeout_s=0.2, directory=tmp_path)
        with lease(2, FOUR, timeout_s=0, directory=tmp_path) as rest:
            assert rest.devices == ("2", "3")


def test_released_devices_can_be_leased_again(tmp_path: Path) -> None:
    """After the block, and after a second release, every device is free."""
    with lease(4, FOUR, directory=tmp_path) as held:
        pass
    held.release()
    with lease(4, FOUR, timeout_s=0, directory=tmp_path) as again:
        assert again.devices == FOUR


def test_more_than_is_visible_is_refused_without_waiting(tmp_path: Path) -> None:
    """A lease larger than the machine names both numbers."""
    with pytest.raises(DeviceUnavailableError, match=r"3 devices needed, 2 visible \(0, 1\)"):
        lease(3, ("0", "1"), directory=tmp_path)


@pytest.mark.parametrize("number", [0, -1])
def test_empty_lease_is_a_mistake(number: int, tmp_path: Path) -> None:
    """Zero devices are never what a caller means."""
    with pytest.raises(UsageError, match="at least one device"):
        lease(number, FOUR, directory=tmp_path)


def test_killed_holder_frees_its_devices(tmp_path: Path) -> None:
    """The lock is the kernel's: it ends with the process, not with clean-up code."""
    code = (
        "import sys; from pathlib import Path; from parity.devices import lease\n"
        "held = lease(1, ('0',), directory=Path(sys.argv[1])); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DeviceUnavailableError):
            lease(1, ("0",), timeout_s=0, directory=tmp_path)
        holder.kill()
        holder.wait()
        lease(1, ("0",), timeout_s=0, directory=tmp_path).release()
