"""A process that kills its children at every moment of a save and looks at what they left.

Run as `python -m tests.fold_impl.killed_saves FOLDER [deepspeed]`; prints one JSON object per way
of saving.
Owns the moments: each call a save makes to the file system, and the middle of each tensor file. A
child is forked, so it costs no start of an interpreter, and dies of SIGKILL like any other process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fold_impl import archive, initialize
from tests.fold_impl.test_checkpoint import (
    MOMENTUM,
    alone,
    fold_config,
    full_model,
    snapshot,
    train,
)

MOMENTS = ((os, "fsync"), (os, "replace"), (shutil, "rmtree"), (Path, "mkdir"))
MAX_MOMENTS = 200


class Death:
    """Kills this process at the n-th moment."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def strike(self) -> None:
        """Count one moment."""
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def plant(self) -> None:
        """Wrap every function a save calls on files."""
        for owner, name in MOMENTS:
            setattr(owner, name, self._before(getattr(owner, name)))
        archive.save_file = self._inside(archive.save_file)  # type: ignore[attr-defined]

    def _before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.strike()
            return call(*args, **kwargs)

        return wrapped

    def _inside(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(tensors: Any, path: Path, *args: Any, **kwargs: Any) -> None:
            call(tensors, path, *args, **kwargs)
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            self.strike()
            path.write_bytes(whole)

        return wrapped


def fingerprint(engine: Any) -> str:
    """Hash everything a checkpoint restores."""
    kept, sha = snapshot(engine), hashlib.sha256()
    sha.update(json.dumps(kept["training"], sort_keys=True).encode())
    for name, weight in kept["weights"].items():
        sha.update(weight.numpy().tobytes())
        for value in kept["optimizer"][name].values():
            sha.update(value.numpy().tobytes())
    return sha.hexdigest()


def native() -> Any:
    """Build the run; momentum, so that there is optimizer state."""
    return alone(seed=9, optimizer=MOMENTUM, schedule=False)


def deepspeed() -> Any:
    """Build it on DeepSpeed's engine: ZeRO-1 with float32 masters of bf16 weights."""
    config = fold_config((1, 1, 1, 1), MOMENTUM, gas=4)
    config |= {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    engine, *_ = initialize(full_model(9).float(), config)
    return engine


def killed(run: Any, folder: Path, tag: str, moment: int) -> bool:
    """Save in a child that dies at a moment; False: the save ended before it came."""
    child = os.fork()
    if child == 0:
        Death(moment).plant()
        run.save_checkpoint(folder, tag=tag)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGKILL
    assert status == 0, f"the save failed by itself: status {status}"
    return False


def main(root: Path, tag: str, engine: Callable[[], Any]) -> dict[str, Any]:
    """Kill a second save under `tag` at every moment and load what is left."""
    run, reader = engine(), engine()
    train(run, 1, 1)
    run.save_checkpoint(root / "base", tag="first")
    states = {fingerprint(run): "first"}
    train(run, 2, 2)
    states[fingerprint(run)] = "second"
    outcomes: list[str] = []
    for moment in range(1, MAX_MOMENTS):
        folder = shutil.copytree(root / "base", root / f"{tag}-{moment}")
        if not killed(run, folder, tag, moment):
            break
        reader.load_checkpoint(folder)
        outcomes.append(states[fingerprint(reader)])
        run.save_checkpoint(folder, tag=tag)  # what the dead one left is no obstacle
        reader.load_checkpoint(folder)
        assert states[fingerprint(reader)] == "second"
        assert sorted(p.name for p in folder.iterdir()) == sorted({"first", tag, "latest"})
    return {"tag": tag, "kills": len(outcomes), "outcomes": outcomes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = deepspeed if sys.argv[2:] == ["deepspeed"] else native
    for chosen in ("second", "first"):
        print(json.dumps(main(Path(sys.argv[1]) / chosen, chosen, made)))
