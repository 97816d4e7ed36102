"""torch.nn's mask arguments as what ``ops.attention`` takes: a ``Mask`` and something to add to the scores.

In torch.nn a True masks OUT and a floating-point mask is added; in ``ops`` and ``masks`` a True attends. A
floating-point mask becomes both: what is -inf is masked, so that a kernel can skip it and a row with nothing left
is defined, and the rest is added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer.masks import Mask, causal, dense, padding

NO_MASK = "is_causal says that attn_mask is causal, and attn_mask is None"


def check_mask(name: str, mask: object, wanted: tuple[tuple[int, ...], ...], letters: str) -> None:
    """A bool or floating-point tensor of one of the wanted shapes."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool (True = masked out) or floating point (added), got {mask.dtype}")
    if tuple(mask.shape) not in wanted:
        shapes = " or ".join(str(list(shape)) for shape in wanted)
        raise ValueError(f"{name} must be {letters} = {shapes}, got {list(mask.shape)}")


def combine(
    attn_mask: Tensor | Mask | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    shape: tuple[int, int, int, int],
) -> tuple[Mask, Tensor | None]:
    """One mask and one addend for a call whose scores are ``shape`` = [B,H,L,S].

    Args:
        attn_mask: [L,S] or [B*H,L,S], bool (True = masked out) or floating point; or a ``Mask``.
        key_padding_mask: [B,S], bool (True = masked out) or floating point.
        is_causal: a query sees no key after its own position, whatever the masks say.
        shape: of the scores.

    Raises:
        RuntimeError: ``is_causal`` without ``attn_mask``, as in torch.
        TypeError, ValueError: a mask's dtype or shape is wrong.
    """
    B, H, L, S = shape
    if is_causal and attn_mask is None:
        raise RuntimeError(f"{NO_MASK}: pass the mask, or pytransformer.masks.causal()")
    mask, added = Mask(), None
    if isinstance(attn_mask, Mask):
        mask = attn_mask
    elif attn_mask is not None:
        check_mask("attn_mask", attn_mask, ((L, S), (B * H, L, S)), "[L,S] or [B*H,L,S]")
        keep, added = _split(attn_mask if attn_mask.dim() == 2 else attn_mask.reshape(B, H, L, S))
        mask = dense(keep)
    if is_causal:
        mask = mask & causal()
    if key_padding_mask is not None:
        check_mask("key_padding_mask", key_padding_mask, ((B, S),), "[B,S]")
        keep, added_keys = _split(key_padding_mask)
        mask = mask & padding(keep)
        if added_keys is not None:
            added_keys = added_keys[:, None, None, :]
            added = added_keys if added is None else added + added_keys
    return mask, added


def _split(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """``(keep, added)`` of a mask in torch.nn's convention."""
    if mask.dtype == torch.bool:
        return ~mask, None
    keep = mask != -torch.inf
    return keep, torch.where(keep, mask, 0)  # 0 where masked: -inf - -inf must not arise anywhere


def is_causal_mask(mask: Tensor) -> bool:
    """Does a square [L,L] mask in torch.nn's convention mask out exactly the keys after each query?"""
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    later = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu_(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, later)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill_(later, -torch.inf))
