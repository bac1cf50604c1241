"""Layouts convert between a family's order and the one everybody reads, without losing a number."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pellucid.anatomy.layout import HEADS, NATIVE, STREAMS, TOKENS, Layout, recognise

LETTERS = "bphekds"
sizes = st.fixed_dictionaries({letter: st.integers(1, 5) for letter in LETTERS})
orders = st.sampled_from([(canonical, native) for canonical, natives in NATIVE.items() for native in natives])


def shape_of(order: str, size: dict[str, int]) -> tuple[int, ...]:
    """`(b h) p` -> (b * h, p)"""
    groups = re.findall(r"\([^)]*\)|\w", order)
    return tuple(math.prod(size[letter] for letter in re.findall(r"\w", group)) for group in groups)


@given(orders, sizes)
def test_reading_and_writing_back_gives_the_same_tensor(order: tuple[str, str], size: dict[str, int]) -> None:
    canonical, native = order
    shape = shape_of(native, size)
    x = torch.arange(math.prod(shape)).reshape(shape)
    layout = Layout(native, canonical, (("h", size["h"]), ("s", size["s"])))
    y = layout.read(x, size["b"])
    assert y.shape == shape_of(canonical, size)
    assert torch.equal(layout.write(y), x)


@given(orders, sizes)
def test_what_is_recognised_has_the_right_shape(order: tuple[str, str], size: dict[str, int]) -> None:
    canonical, native = order
    found = recognise(shape_of(native, size), canonical, **size)
    assert found is not None  # for some sizes several orders fit; any of them reads the right shape
    x = torch.zeros(shape_of(native, size))
    assert found.read(x, size["b"]).shape == shape_of(canonical, size)


@pytest.mark.parametrize(
    ("native", "canonical", "made"),
    [
        ("(b h) p e", HEADS, "x[b * 3 + h, p, e]"),
        ("p b (h e)", HEADS, "x[p, b, h * 2 + e]"),
        ("b (h e) p", HEADS, "x[b, h * 2 + e, p]"),
    ],
)
def test_every_number_lands_where_its_letters_say(native: str, canonical: str, made: str) -> None:
    size = {"b": 2, "p": 4, "h": 3, "e": 2}
    x = torch.arange(48).reshape(shape_of(native, size))
    y = Layout(native, canonical, (("h", 3),)).read(x, 2)
    for b, p, h, e in torch.cartesian_prod(*(torch.arange(size[letter]) for letter in "bphe")).tolist():
        assert y[b, p, h, e] == eval(made, {"x": x, "b": b, "p": p, "h": h, "e": e})


def test_parallel_streams_are_read_as_one_wide_residual() -> None:
    x = torch.randn(3, 2, 5, 4)  # s b p d
    layout = recognise((3, 2, 5, 4), STREAMS, s=3, b=2, p=5, d=4)
    assert layout is not None
    assert torch.equal(layout.read(x, 2), torch.cat(list(x), -1))


def test_a_scale_makes_the_canonical_value_and_is_undone_when_writing() -> None:
    x = torch.randn(2, 3, 4)
    layout = Layout(TOKENS, TOKENS, scale=0.5)
    assert torch.equal(layout.read(x, 2), x * 0.5)
    assert torch.allclose(layout.write(layout.read(x, 2)), x)


def test_a_shape_that_fits_no_order_is_not_recognised() -> None:
    assert recognise((2, 7, 9), HEADS, b=2, p=7, h=2, e=4) is None
