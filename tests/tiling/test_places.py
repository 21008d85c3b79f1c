"""Calls that compute with a place or the size of the image, and constants that know neither."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reaching import Function, bound_for
from torch import Tensor

PLACED: dict[str, Callable[[Tensor], Tensor]] = {
    "a ramp": lambda x: x * (torch.arange(x.shape[-1]) / x.shape[-1]),
    "numbered columns": lambda x: x + torch.arange(x.shape[-1]) % 3,
    "a running sum of ones": lambda x: x * torch.ones_like(x).cumsum(-1),
    "a stretched table": lambda x: x + F.interpolate(torch.eye(4)[None, None], size=x.shape[2:]),
    "a diagonal": lambda x: x * torch.eye(x.shape[-2], x.shape[-1]),
    "a triangle": lambda x: x.tril(),
    "joined halves": lambda x: x + torch.cat([torch.zeros(x.shape[-1] // 2), torch.ones(x.shape[-1] // 2)]),
    "divided by the size": lambda x: x / x.shape[-1],
    "times the number of pixels": lambda x: x * x.shape[-1] * x.shape[-2],
    "filled with the size": lambda x: x + torch.full((1,), x.shape[-1]),
    "a repeated pattern": lambda x: x * torch.arange(3.0).repeat((x.shape[-1] + 2) // 3)[: x.shape[-1]],
    "a row of a table": lambda x: x + torch.arange(4096.0)[x.shape[-1] : x.shape[-1] + 1],
    "corners aligned": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
}
UNPLACED: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: x + torch.zeros_like(x) + torch.zeros(x.shape[-1]),
    "a bias that is expanded": lambda x: x + torch.ones(1, 1, 1, 1).expand_as(x) * 2,
    "columns of a window": lambda x: (x.unflatten(-1, (-1, 4)) * torch.arange(4.0)).flatten(-2),
    "a view by its size": lambda x: x.reshape(x.shape[0], -1, x.shape[-1]).view_as(x),
    "padded to a lattice": lambda x: F.pad(x, (0, -x.shape[-1] % 8))[..., : x.shape[-1]],
    "doubled": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "a table that is detached": lambda x: (x.unflatten(-1, (-1, 4)) * torch.arange(4.0).detach_()).flatten(
        -2
    ),
    "a kernel": lambda x: F.conv2d(x, torch.arange(9.0).view(1, 1, 3, 3), padding=1),
}


@pytest.mark.parametrize("name", PLACED)
def test_what_knows_a_place_or_the_size_is_seen(name: str):
    assert bound_for(Function(PLACED[name]), (1, 1, 24, 48)).knows_places


@pytest.mark.parametrize("name", UNPLACED)
def test_what_knows_neither_is_not_suspected(name: str):
    """Control."""
    assert not bound_for(Function(UNPLACED[name]), (1, 1, 24, 48)).knows_places


def _written(x: Tensor) -> Tensor:
    """A map of zeros in which a part is set, by a view of it."""
    ramp = torch.zeros(1, 1, *x.shape[2:])
    ramp[..., : x.shape[-1] // 2].fill_(1)
    return x * ramp


def test_what_is_written_part_by_part_is_placed():
    assert bound_for(Function(_written), (1, 1, 24, 48)).knows_places
