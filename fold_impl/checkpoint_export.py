"""Export the full weights of a checkpoint as Hugging Face writes them.

Owns the files of an export. Must not know engines or ranks: one process without a process group
does it. Easy to get wrong: tied weights are stored once and must come back under every name.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fold_impl import archive
from fold_impl.archive import CheckpointError, Reader, Stored

EXPORT_SHARD_BYTES = 5 * 10**9
"""Largest exported file: transformers' own default."""


def state_dict(
    folder: str | os.PathLike[str], tag: str | None = None, *, master: bool = False
) -> dict[str, Tensor]:
    """Give the full weights and buffers under their names in the original model, tied ones too.

    Args:
        folder: directory the checkpoint was saved to.
        tag: which one; None: the latest.
        master: keep the precision that was trained instead of the one the model runs in.

    Returns:
        What the original model's `load_state_dict` takes, on the CPU.

    Raises:
        CheckpointError: the checkpoint is not whole.
    """
    path = archive.find(Path(folder), tag)
    index = archive.read_index(path)
    files = [file for file in index.files if file.startswith("model/")]
    archive.verify(path, index, files)
    with Reader(path, index) as reader:
        full = {
            stored.name: reader.whole(key).to(_export_dtype(stored, master))
            for key, stored in index.tensors.items()
            if stored.folder == "model"
        }
    return full | {alias: full[name] for alias, name in index.aliases.items()}


def _export_dtype(stored: Stored, master: bool) -> torch.dtype:
    name = stored.dtype if master or stored.runs_as is None else stored.runs_as
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def export(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    tag: str | None = None,
    *,
    master: bool = False,
    shard_bytes: int = EXPORT_SHARD_BYTES,
) -> Path:
    """Write a checkpoint's weights as Hugging Face does: safetensors and, where split, an index.

    Args:
        folder: directory the checkpoint was saved to.
        target: directory to make; must not exist.
        tag: which one; None: the latest.
        master: keep the precision that was trained instead of the one the model runs in.
        shard_bytes: size at which a new file begins.

    Raises:
        CheckpointError: the checkpoint is not whole, or the target exists.
    """
    made = Path(target)
    if made.exists():
        raise CheckpointError("exists already", made, "a new directory", "something")
    full = state_dict(folder, tag, master=master)
    partial = made.with_name(f".{made.name}.partial-{uuid.uuid4().hex[:12]}")
    partial.mkdir(parents=True)
    try:
        _write_plain(partial, list(_split(full, shard_bytes)))
        os.replace(partial, made)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    archive.sync(made.parent)
    return made


def _split(full: Mapping[str, Tensor], limit: int) -> Iterable[dict[str, Tensor]]:
    """Fill files up to the limit; tied weights get memory of their own."""
    current: dict[str, Tensor] = {}
    size = 0
    for name, tensor in full.items():
        if current and size + tensor.nbytes > limit:
            yield current
            current, size = {}, 0
        current[name] = tensor.clone()
        size += tensor.nbytes
    yield current


def _write_plain(folder: Path, parts: Sequence[Mapping[str, Tensor]]) -> None:
    places: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        numbered = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        file = numbered if len(parts) > 1 else "model.safetensors"
        save_file(dict(part), folder / file, metadata={"format": "pt"})
        archive.sync(folder / file)
        places |= dict.fromkeys(part, file)
    if len(parts) > 1:
        total = sum(tensor.nbytes for part in parts for tensor in part.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        archive.write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))
    archive.sync(folder)
