"""One rank's tensors on their way to the judge: one array, not one per tensor.

Owns how many named tensors are copied, sent and taken apart. Must not know what they are. Easy to
get wrong: they are copied when they are read, an engine reuses its memory; and 16-bit floats travel
as float32, which loses nothing and which NumPy knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """A copy of a rank's tensors by name.

    A message of a world of 30 ranks is some 2,000 tensors: as arrays of their own, copying,
    pickling and reading them took longer than moving their bytes.

    Attributes:
        flats: 1-D NumPy arrays, one for each dtype and device there was.
        places: name -> (index of its array, shape), in the order given; None for None.
    """

    flats: tuple[Any, ...]
    places: Mapping[str, tuple[int, tuple[int, ...]] | None]

    @classmethod
    @torch.no_grad()
    def copied(cls, tensors: Mapping[str, Tensor | None]) -> Pieces:
        """Copy tensors of any shape, dtype and device to the CPU."""
        kinds: dict[tuple[torch.dtype, torch.device], int] = {}
        parts: list[list[Tensor]] = []
        places: dict[str, tuple[int, tuple[int, ...]] | None] = {}
        for name, tensor in tensors.items():
            if tensor is None:
                places[name] = None
                continue
            kind = kinds.setdefault((tensor.dtype, tensor.device), len(parts))
            if kind == len(parts):
                parts.append([])
            parts[kind].append(tensor.reshape(-1))
            places[name] = kind, tuple(tensor.shape)
        return cls(tuple(as_array(torch.cat(flat)) for flat in parts), places)

    @property
    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Name -> shape, None for None."""
        return {name: None if place is None else place[1] for name, place in self.places.items()}

    def tensors(self) -> dict[str, Tensor | None]:
        """Take them apart again: views of the arrays."""
        flats = [torch.from_numpy(flat) for flat in self.flats]
        begins = [0] * len(flats)
        found: dict[str, Tensor | None] = {}
        for name, place in self.places.items():
            if place is None:
                found[name] = None
                continue
            kind, shape = place
            end = begins[kind] + torch.Size(shape).numel()
            found[name] = flats[kind][begins[kind] : end].view(shape)
            begins[kind] = end
        return found


def as_array(tensor: Tensor) -> Any:
    """View a tensor, or a copy on the CPU in a dtype that NumPy knows, as a NumPy array."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()
