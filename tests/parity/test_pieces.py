"""Tensors on their way: whatever is put in comes out, and is nobody else's memory."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parity.pieces import Pieces

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
KINDS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
MADE = st.dictionaries(st.text(), st.none() | st.tuples(SHAPES, KINDS), max_size=6)


@given(MADE)
def test_everything_comes_back(made: dict[str, tuple[tuple[int, ...], torch.dtype] | None]) -> None:
    """Names in order, shapes, values and None; 16 bits as float32, whose values they are."""
    put: dict[str, Tensor | None] = {
        name: None if kind is None else torch.randn(kind[0]).to(kind[1])
        for name, kind in made.items()
    }
    got = pickle.loads(pickle.dumps(Pieces.copied(put))).tensors()
    assert list(got) == list(put)
    for name, tensor in put.items():
        other = got[name]
        if tensor is None or other is None:
            assert other is tensor
            continue
        wide = tensor.float() if tensor.element_size() == 2 else tensor
        assert (other.shape, other.dtype) == (wide.shape, wide.dtype)
        assert torch.equal(other, wide)


@pytest.mark.parametrize("transposed", [False, True])
def test_they_are_copies(transposed: bool) -> None:
    """An engine goes on with its memory; and a view is copied in the order of its entries."""
    weight = torch.arange(6.0).reshape(2, 3)
    given_ = weight.T if transposed else weight
    pieces = Pieces.copied({"w": given_})
    expected = given_.clone()
    weight.zero_()
    found = pieces.tensors()["w"]
    assert found is not None
    assert torch.equal(found, expected)
