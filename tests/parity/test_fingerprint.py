"""What a run ran on: how much of the cores the host kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parity import fingerprint


@pytest.mark.parametrize(("stolen_s", "share"), [(0.0, 0.0), (5.0, 0.25), (50.0, 1.0)])
def test_the_share_is_of_all_cores(
    monkeypatch: pytest.MonkeyPatch, stolen_s: float, share: float
) -> None:
    """Two cores, ten seconds: 20 core-seconds. Counters of a migrated machine may jump."""
    now = {"stolen": 100.0, "time": 1000.0}
    monkeypatch.setattr(fingerprint, "_stolen_s", lambda: now["stolen"])
    monkeypatch.setattr("time.monotonic", lambda: now["time"])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    clock = fingerprint.HostClock()
    now["stolen"] += stolen_s
    now["time"] += 10.0
    assert clock.share() == share
    said = "" if share < 0.2 else f"the host kept {share:.0%} of the cores' time"
    assert clock.note() == said


def test_the_counter_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eighth number of the first line, in ticks; nothing where there is no such file."""
    line = "cpu  11 12 13 14 15 16 17 4200 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: line)
    assert fingerprint._stolen_s() == 4200 / os.sysconf("SC_CLK_TCK")

    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert fingerprint._stolen_s() == 0.0
