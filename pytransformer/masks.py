"""The mask algebra: masks are built from a few kinds and composed with ``&``.

    m = masks.causal() & masks.padding(keep) & masks.window(256)
    ops.attention(q, k, v, attn_mask=m)

A mask says which keys a query may attend to (True = attend). Causal and window masks stay analytic (a band
of s - t), lengths stay one number a sequence, and only what is left becomes a bool tensor, so a kernel can
skip what is masked instead of computing it and throwing it away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ALIGNMENTS = ("top_left", "bottom_right")


@dataclass(frozen=True, eq=False)
class Mask:
    """A conjunction of masks. Built by the functions of this module, combined by ``&``.

    Attributes:
        causal: a query does not see the keys after it.
        left, right: how many keys a window lets a query see to either side; None where unbounded.
        align: for causal and window masks with T != S: ``"top_left"`` (query t sits at key t, as in torch's
            SDPA), ``"bottom_right"`` (the last query sits at the last key, as in decoding), None where open.
        key_lengths: int64 [B]; keys from there on are masked out.
        keep: bool, broadcastable to [B,H,T,S].
    """

    causal: bool = False
    left: int | None = None
    right: int | None = None
    align: str | None = None
    key_lengths: Tensor | None = None
    keep: Tensor | None = None

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        if self is EVERYTHING:
            return other
        if self.align is not None and other.align is not None and self.align != other.align:
            raise ValueError(f"masks: cannot combine alignments {self.align!r} and {other.align!r}")
        return Mask(
            causal=self.causal or other.causal,
            left=_smaller(self.left, other.left),
            right=_smaller(self.right, other.right),
            align=self.align or other.align,
            key_lengths=_both(self.key_lengths, other.key_lengths, torch.minimum),
            keep=_both(self.keep, other.keep, torch.logical_and),
        )

    def aligned(self, align: str) -> Mask:
        """The same mask with an open alignment settled."""
        return self if self.align is not None else replace(self, align=align)

    def band(self, query_length: int, key_length: int) -> tuple[int | None, int | None]:
        """``(lower, upper)`` with key s visible to query t only if ``lower <= s - t <= upper``."""
        offset = key_length - query_length if self.align == "bottom_right" else 0
        right = _smaller(self.right, 0 if self.causal else None)
        lower = None if self.left is None else offset - self.left
        upper = None if right is None else offset + right
        return lower, upper


EVERYTHING = Mask()  # every query sees every key


def causal(align: str | None = None) -> Mask:
    """A query sees no key after its own position.

    Raises:
        ValueError: ``align`` is neither ``"top_left"`` nor ``"bottom_right"`` nor None.
    """
    _check_align(align)
    return Mask(causal=True, align=align)


def window(left: int, right: int | None = -1, align: str | None = None) -> Mask:
    """A query sees ``left`` keys before its own position and ``right`` after it.

    Without ``right`` the window is symmetric (the restricted self-attention of Vaswani et al., 2017,
    sec. 4, with r = ``left``); ``right=None`` leaves that side open.

    Raises:
        ValueError: a side is negative.
    """
    _check_align(align)
    if right == -1:
        right = left
    for name, side in (("left", left), ("right", right)):
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0):
            raise ValueError(f"masks.window: {name} must be a non-negative integer, got {side!r}")
    return Mask(left=left, right=right, align=align)


def padding(mask_or_lengths: Tensor) -> Mask:
    """Masks padding: a bool [B,S] (True = a real key), or integer lengths [B] of sequences padded at the end.

    Raises:
        ValueError: neither of these.
    """
    x = mask_or_lengths
    if isinstance(x, Tensor) and x.dtype == torch.bool and x.dim() == 2:
        return Mask(keep=x[:, None, None, :])
    if isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64) and x.dim() == 1:
        return Mask(key_lengths=x.to(torch.int64))
    got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else repr(x)
    raise ValueError(f"masks.padding: wants bool [B,S] (True = attend) or integer lengths [B], got {got}")


def dense(keep: Tensor) -> Mask:
    """Any mask: bool, broadcastable to [B,H,T,S], True = attend.

    Raises:
        ValueError: it is not bool.
    """
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        raise ValueError(f"masks.dense: wants a bool tensor (True = attend), got {getattr(keep, 'dtype', keep)!r}")
    return Mask(keep=keep)


def _smaller(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _both(a: Tensor | None, b: Tensor | None, combine) -> Tensor | None:  # type: ignore[no-untyped-def]
    return b if a is None else a if b is None else combine(a, b)


def _check_align(align: str | None) -> None:
    if align is not None and align not in ALIGNMENTS:
        raise ValueError(f"masks: align must be 'top_left', 'bottom_right' or None, got {align!r}")
