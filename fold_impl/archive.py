"""One checkpoint directory: its index, its safetensors files, and whether they are as written.

Owns names, layout of the directory, hashes, and reading any rectangle of any tensor. Must not know
engines or collectives. Easy to get wrong: nothing here unpickles, and nothing is believed before
size and hash of its file agree with the index.

    <dir>/latest                     tag of the newest checkpoint
    <dir>/<tag>/checkpoint.json      index: layout, placement of every tensor, sizes and hashes
    <dir>/<tag>/model/               weights and buffers, one file per writing rank
    <dir>/<tag>/optimizer/           optimizer state, named as torch flattens it: state.<name>.<key>
    <dir>/<tag>/random/              generators of every (dp index, lane)

Files are those of `torch.distributed.checkpoint.HuggingFaceStorageWriter`, whose reader reads them
(`shard-00001-model-00001-of-00001.safetensors` with `DCP_SHARDING_INFO`). One file holds at most
one rectangle of a tensor, so a rank's second rectangle stands in its second file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fold_impl.blocks import Block, Size, blocks, full_shape, overlap, tiles, writers
from fold_impl.families import Placement, Shard
from fold_impl.layout import FoldLayout, LayoutError

FORMAT, VERSION = "fold_impl.checkpoint", 1
INDEX, LATEST = "checkpoint.json", "latest"
PREVIOUS = ".{tag}.previous"
"""Where a checkpoint of the same tag waits while its successor takes its name."""

DTYPES: Mapping[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""torch's name of a dtype -> that of safetensors."""


class CheckpointError(Exception):
    """A checkpoint that cannot be written, or read into this engine; raised on every rank alike.

    Args:
        problem: What is wrong.
        where: File, tensor or setting it is wrong with.
        expected: What would do.
        found: What is there instead.
    """

    def __init__(
        self, problem: str, where: object, expected: object = None, found: object = None
    ) -> None:
        super().__init__(problem, str(where), expected, found)
        self.problem, self.where, self.expected, self.found = problem, where, expected, found

    def __str__(self) -> str:
        text = f"{self.where}: {self.problem}"
        if self.expected is None and self.found is None:
            return text
        return f"{text}; expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class Stored:
    """A full logical tensor of a checkpoint, and how the ranks that wrote it had cut it."""

    folder: Literal["model", "optimizer"]
    key: str
    """Name inside the files."""
    name: str
    """Parameter or buffer it belongs to."""
    state: str | None
    """Which entry of the optimizer's state; None: the weight or buffer itself."""
    shape: Size
    dtype: str
    placement: Placement | None
    """None: a buffer, or a counter of the optimizer, which every rank holds whole."""
    runs_as: str | None = None
    """dtype the engine computes a weight in, where this is its master copy."""

    @property
    def cut(self) -> Placement:
        """Placement that says how to cut; for what is not cut, one without cuts."""
        return self.placement or Placement("dense")


class Piece(NamedTuple):
    """One rectangle of a tensor: the rank that wrote it, and its file."""

    rank: int
    block: Block
    file: str


@dataclass(frozen=True)
class Index:
    """Everything a checkpoint says about itself."""

    tag: str
    layout: FoldLayout
    tensors: Mapping[str, Stored]
    """folder/key -> tensor."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further name of a tied weight -> the name it is stored under."""
    scalars: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """parameter -> entries of the optimizer's state that are plain numbers."""
    training: Mapping[str, Any] = field(default_factory=dict)
    client_state: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """file -> bytes, sha256."""

    @cached_property
    def pieces(self) -> dict[str, list[Piece]]:
        """Where every tensor's rectangles stand: folder/key -> pieces, in the order of writers."""
        drawn: dict[str, list[tuple[int, int, Block]]] = {}
        most: dict[str, int] = {}
        for key, stored in self.tensors.items():
            drawn[key] = [
                (rank, number, block)
                for rank in writers(stored.cut, self.layout)
                for number, block in enumerate(blocks(stored.shape, stored.cut, self.layout, rank))
            ]
            deepest = max(number for _, number, _ in drawn[key]) + 1
            most[stored.folder] = max(most.get(stored.folder, 1), deepest)
        return {
            key: [
                Piece(rank, block, _file(self.tensors[key].folder, rank, number, most))
                for rank, number, block in found
            ]
            for key, found in drawn.items()
        }

    def to_json(self) -> str:
        """Write the index with a checksum of itself."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({"sha256": digest(body), **body}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Index:
        """Read an index.

        Raises:
            CheckpointError: it is cut off, was changed, or is of another format.
        """
        try:
            body = json.loads(text)
            told = (body.pop("format"), body.pop("version"))
            checksum = body.pop("sha256")
            if told != (FORMAT, VERSION):
                raise CheckpointError("unknown format", path, (FORMAT, VERSION), told)
            if checksum != (actual := digest({"format": FORMAT, "version": VERSION, **body})):
                raise CheckpointError("changed since written", path, checksum, actual)
            layout = FoldLayout(**body.pop("layout"))
            tensors = {key: _stored(entry) for key, entry in body.pop("tensors").items()}
            return cls(layout=layout, tensors=tensors, **body)
        except (ValueError, TypeError, KeyError, AttributeError, LayoutError) as error:
            raise CheckpointError(f"not a whole index ({error!r})", path) from error


def _stored(entry: dict[str, Any]) -> Stored:
    placement = entry.pop("placement")
    if placement is not None:
        shards = tuple(Shard(**shard) for shard in placement["shards"])
        placement = Placement(placement["family"], shards)
    return Stored(placement=placement, shape=tuple(entry.pop("shape")), **entry)


def digest(value: Any) -> str:
    """Hash a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- what stands in which file


def _file(folder: str, rank: int, number: int, most: Mapping[str, int]) -> str:
    return (
        f"{folder}/shard-{rank + 1:05d}-{folder}-{number + 1:05d}-of-{most[folder]:05d}.safetensors"
    )


def random_file(dp: int, lane: int) -> str:
    """Name the file with the generators of a (dp index, lane)."""
    return f"random/dp-{dp:05d}-lane-{lane:05d}.safetensors"


def stored_tensor(
    folder: Literal["model", "optimizer"],
    name: str,
    part: Tensor,
    placement: Placement | None,
    layout: FoldLayout,
    *,
    state: str | None = None,
    runs_as: str | None = None,
) -> Stored:
    """Describe the full tensor a rank's part belongs to.

    Raises:
        CheckpointError: safetensors has no such dtype.
    """
    dtype = str(part.dtype).removeprefix("torch.")
    key = name if state is None else f"state.{name}.{state}"
    if dtype not in DTYPES:
        raise CheckpointError("dtype cannot be stored", key, ", ".join(DTYPES), dtype)
    shape = full_shape(part.shape, placement, layout) if placement else tuple(part.shape)
    return Stored(folder, key, name, state, shape, dtype, placement, runs_as)


# ---------------------------------------------------------------- writing


def write_tensors(
    root: Path, file: str, tensors: Mapping[str, Tensor], offsets: Mapping[str, Size]
) -> dict[str, Any]:
    """Write one safetensors file to the disk and give its size and hash."""
    told = {key: {"saved_offsets": list(offset)} for key, offset in offsets.items()}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(told)}
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata=metadata)
    sync(path)
    sync(path.parent)
    return {"bytes": path.stat().st_size, "sha256": hash_of(path)}


def write_text(path: Path, text: str) -> None:
    """Write a text file to the disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def switch_text(path: Path, text: str) -> None:
    """Replace a text file at once: a reader sees the old or the new one."""
    beside = path.with_name(f".{path.name}.new")
    write_text(beside, text)
    os.replace(beside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_of(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as stream:
        sha = hashlib.sha256()
        while chunk := stream.read(1 << 22):
            sha.update(chunk)
    return sha.hexdigest()


# ---------------------------------------------------------------- reading


def find(folder: Path, tag: str | None) -> Path:
    """Find a checkpoint by tag, or the latest.

    Raises:
        CheckpointError: there is none, or the tag is none.
    """
    if tag is None:
        latest = folder / LATEST
        if not latest.is_file():
            raise CheckpointError("there is no checkpoint", latest, "a file", "none")
        tag = latest.read_text(encoding="utf-8").strip()
    check_tag(tag)
    path = folder / tag
    if not path.is_dir() and (aside := folder / PREVIOUS.format(tag=tag)).is_dir():
        return aside  # a save of the same tag was killed between its two renames
    if not path.is_dir():
        raise CheckpointError("there is no such checkpoint", path, "a directory", "none")
    return path


def check_tag(tag: str) -> None:
    """Refuse a tag that cannot name a directory of its own."""
    if not tag or tag.startswith(".") or tag == LATEST or set(tag) & set("/\\\0\n"):
        raise CheckpointError("not a tag", "tag", "a plain directory name", repr(tag))


def read_index(path: Path) -> Index:
    """Read the index of a checkpoint directory.

    Raises:
        CheckpointError: it is missing, cut off, or not what it says.
    """
    file = path / INDEX
    if not file.is_file():
        raise CheckpointError("missing", file, "the index of a checkpoint", "none")
    index = Index.from_json(file.read_text(encoding="utf-8", errors="replace"), file)
    for key, stored in index.tensors.items():
        if not tiles(stored.shape, stored.cut, index.layout):
            found = f"shape {stored.shape} under {_cuts(stored.cut)}"
            raise CheckpointError("cannot be cut as recorded", key, index.layout, found)
    needed = {piece.file for found in index.pieces.values() for piece in found}
    if unlisted := sorted(needed - set(index.files)):
        raise CheckpointError("not listed in the index", unlisted[0], "size and hash", "none")
    return index


def verify(path: Path, index: Index, files: Iterable[str]) -> None:
    """Compare files with what the index says of them.

    Raises:
        CheckpointError: the first file that is missing, shorter, longer, changed, or holds other
            tensors than its place demands.
    """
    holds: dict[str, dict[str, tuple[Size, Size, str]]] = {}
    for key, found in index.pieces.items():
        stored = index.tensors[key]
        for piece in found:
            facts = (piece.block.offset, piece.block.shape, DTYPES[stored.dtype])
            holds.setdefault(piece.file, {})[stored.key] = facts
    for file in files:
        _verify_bytes(path / file, index.files[file])
        if file in holds:
            _verify_header(path / file, holds[file])


def _verify_bytes(path: Path, told: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError("missing", path, f"{told['bytes']} bytes", "no file")
    if (size := path.stat().st_size) != told["bytes"]:
        problem = "truncated" if size < told["bytes"] else "longer than written"
        raise CheckpointError(problem, path, f"{told['bytes']} bytes", f"{size} bytes")
    if (sha := hash_of(path)) != told["sha256"]:
        raise CheckpointError("changed since written", path, f"sha256 {told['sha256']}", sha)


def _verify_header(path: Path, expected: Mapping[str, tuple[Size, Size, str]]) -> None:
    try:
        with safe_open(path, "pt") as opened:
            told = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            found = {
                key: (tuple(told[key]["saved_offsets"]), tuple(s.get_shape()), s.get_dtype())
                for key, s in slices.items()
            }
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"not a shard of a checkpoint ({error!r})", path) from error
    for key in sorted({*expected, *found}):
        if expected.get(key) != found.get(key):
            where = f"{path}: {key}"
            problem = "another rectangle (offset, shape, dtype) than its placement"
            raise CheckpointError(problem, where, expected.get(key), found.get(key))


def _cuts(placement: Placement) -> str:
    cuts = ", ".join(f"dim {s.dim} over {s.axis}" for s in placement.shards)
    return f"{placement.family} cut {cuts}" if cuts else f"{placement.family}, whole"


def describe_placement(placement: Placement | None) -> str:
    """Say family and cuts in words."""
    return "no parameter" if placement is None else _cuts(placement)


class Reader:
    """Reads rectangles of tensors; keeps files open while in use."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self.index = path, index
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def part(self, key: str, wanted: list[Block]) -> Tensor:
        """Read the part made of the wanted rectangles, from whatever files hold them."""
        stored = self.index.tensors[key]
        shape = tuple(map(max, zip(*(_ends(b) for b in wanted), strict=True)))
        part = torch.empty(shape, dtype=getattr(torch, stored.dtype))
        filled = 0
        for piece in self.index.pieces[key]:
            for block in wanted:
                shared = overlap(piece.block, block)
                if shared is not None:
                    source = self._slice(piece.file, stored.key, shared.stored, shared.shape)
                    part[_slices(shared.wanted, shared.shape)] = source
                    filled += source.numel()
        assert filled == part.numel(), f"{key}: {filled} of {part.numel()} entries"
        return part

    def whole(self, key: str) -> Tensor:
        """Read a full tensor."""
        shape = self.index.tensors[key].shape
        start = (0,) * len(shape)
        return self.part(key, [Block(start, start, shape)])

    def all_of(self, file: str) -> dict[str, Tensor]:
        """Read every tensor of a file."""
        opened = self._opened(file)
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(self.path / file, "pt"))
        return self._open[file]

    def _slice(self, file: str, key: str, start: Size, shape: Size) -> Tensor:
        opened = self._opened(file)
        if not shape:
            tensor: Tensor = opened.get_tensor(key)
        else:
            tensor = opened.get_slice(key)[_slices(start, shape)]
        return tensor


def _ends(block: Block) -> Size:
    return tuple(at + size for at, size in zip(block.local, block.shape, strict=True))


def _slices(start: Size, shape: Size) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))
