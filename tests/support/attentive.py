"""A network that attends to all positions, in every form in which people write that."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FORMS", "Attends"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _softmax_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys in rows, values in columns, as in dual attention."""
    weights = (k * k.shape[-1] ** -0.5 @ q.transpose(-1, -2)).softmax(-2)
    return (v.transpose(-1, -2) @ weights).transpose(-1, -2)


def _batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, heads, tokens, size = q.shape
    flat = [x.reshape(n * heads, tokens, size) for x in (q, k, v)]
    scores = torch.baddbmm(
        flat[0].new_empty(1, 1, 1), flat[0], flat[1].transpose(1, 2), beta=0, alpha=size**-0.5
    )
    return torch.bmm(F.dropout(scores.softmax(-1), 0.5, training=False), flat[2]).view(n, heads, tokens, size)


FORMS: dict[str, Attention] = {
    "fused": F.scaled_dot_product_attention,
    "fused, scaled": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
    "matmul": lambda q, k, v: (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v,
    "scaled before": lambda q, k, v: ((q * 0.4) @ k.mT).float().softmax(dim=-1).to(v.dtype) @ v,
    "of directions": lambda q, k, v: (
        (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * 4.0).softmax(-1) @ v
    ),
    "keys in rows": _softmax_first,
    "baddbmm": _batched,
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).mul(0.5).softmax(-1), v
    ),
    "einsum, turned": lambda q, k, v: torch.einsum(
        "bhji,bhjd->bihd", torch.einsum("bhid,bhjd->bhji", q, k).softmax(2), v
    ).transpose(1, 2),
}


class Attends(nn.Module):
    """GroupNorm and attention between convolutions, at half the extent; weights that make all of it count."""

    def __init__(self, form: str | Attention = "fused", *, reduced: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.attention = FORMS[form] if isinstance(form, str) else form
        self.down = nn.Conv2d(1, 8, 3, 2, 1)
        self.norm = nn.GroupNorm(2, 8) if norm else nn.Identity()
        self.reduce = nn.Conv2d(8, 8, reduced, reduced)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.last = nn.Conv2d(8, 1, 3, padding=1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.6, generator=torch.Generator().manual_seed(parameter.numel()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        n, c, h, w = y.shape
        # the norm sees tokens, as it does in autoencoders
        tokens = self.norm(y.flatten(2)).transpose(1, 2)
        over_space = tokens.transpose(1, 2).reshape(n, c, h, w)
        keys = self.reduce(over_space).flatten(2).transpose(1, 2)
        q, k, v = (
            layer(t).unflatten(2, (2, 4)).transpose(1, 2)
            for layer, t in ((self.q, tokens), (self.k, keys), (self.v, keys))
        )
        seen = (
            self.attention(q, k, v).transpose(1, 2).reshape(n, h * w, c).transpose(1, 2).reshape(n, c, h, w)
        )
        return self.last(self.up(y + seen).relu())
