"""torch.nn's mask arguments as what ``ops.attention`` takes: a ``Mask`` and something to add to the scores.

In torch.nn a True masks OUT and a floating-point mask is added; in ``ops`` and ``masks`` a True attends. A
floating-point mask becomes both: what is -inf is masked, so that a kernel can skip it and a row with nothing left
is defined, and the rest is added.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.masks import Mask, causal, dense, padding
from pytransformer.ops._op import plain_eager

Shape = tuple[int, int, int, int]  # of scores, [B,H,L,S]


class LayerMasks(NamedTuple):
    """The mask arguments of a layer, in torch.nn's convention and order."""

    attn_mask: Tensor | Mask | None
    key_padding_mask: Tensor | None
    is_causal: bool


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
    shape: Shape,
    align: str | None = None,
) -> tuple[Mask, Tensor | None]:
    """One mask and one addend for a call whose scores are ``shape`` = [B,H,L,S].

    Args:
        attn_mask: [L,S] or [B*H,L,S], bool (True = masked out) or floating point; or a ``Mask``.
        key_padding_mask: [B,S], bool (True = masked out) or floating point.
        is_causal: a query sees no key after its own position, whatever the masks say.
        shape: of the scores.
        align: of causal masks and windows that leave it open. With ``"bottom_right"``, the one of calls with a
            cache, ``is_causal`` needs no ``attn_mask``.

    Raises:
        RuntimeError: ``is_causal`` without ``attn_mask``, as in torch.
        TypeError, ValueError: a mask's dtype or shape is wrong.
    """
    B, H, L, S = shape
    if is_causal and attn_mask is None and align != "bottom_right":
        raise RuntimeError(
            "is_causal says that attn_mask is causal, and attn_mask is None: pass the mask, or"
            " pytransformer.masks.causal()"
        )
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
    return mask if align is None else mask.aligned(align), added


def _split(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """``(keep, added)`` of a mask in torch.nn's convention."""
    if mask.dtype == torch.bool:
        return ~mask, None
    keep = mask != -torch.inf
    return keep, torch.where(keep, mask, 0)  # 0 where masked: -inf - -inf must not arise anywhere


def layer_masks(
    given: LayerMasks,
    shape: Shape,
    mergeable: bool,
    batched: bool,
    *,
    recognise: bool = False,
    align: str | None = None,
) -> LayerMasks:
    """The masks of a stack as each of its layers takes them, with what all layers would do to them done once.

    Args:
        given: the masks of the stack. shape: of the scores.
        mergeable: every layer takes a ``Mask``, and nobody else sees it.
        batched: is ``key_padding_mask`` [B,S], or [S]?
        recognise: look whether the mask is causal. One pass over it, and in plain eager mode only: looking at what
            a tensor holds would break a traced graph.
        align: as in ``combine``.
    """
    mask, key_padding_mask, is_causal = given
    B, _, L, S = shape
    if key_padding_mask is not None:
        wanted, letters = ((B, S), "[B,S]") if batched else ((S,), "[S]")
        check_mask("key_padding_mask", key_padding_mask, (wanted,), letters)
        key_padding_mask = _without_zeros(key_padding_mask) if mergeable else key_padding_mask
    if recognise and isinstance(mask, Tensor) and is_causal_mask(mask, L, S):
        mask, is_causal = causal() if mergeable else mask, True
    if not mergeable or _is_additive(mask) or _is_additive(key_padding_mask):
        return LayerMasks(mask, key_padding_mask, is_causal)
    if mask is None and key_padding_mask is None and not is_causal:
        return LayerMasks(None, None, False)
    if key_padding_mask is not None and not batched:
        key_padding_mask = key_padding_mask[None]
    return LayerMasks(combine(mask, key_padding_mask, is_causal, shape, align)[0], None, False)


def is_causal_mask(mask: Tensor, query_length: int, key_length: int) -> bool:
    """Does an [L,S] mask mask out exactly the keys after each query, the last query at the last key? No, for one
    that wants a gradient or that nobody may look into."""
    if tuple(mask.shape) != (query_length, key_length) or query_length > key_length or not _is_constant(mask):
        return False
    later = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu_(1 + key_length - query_length)
    if mask.dtype == torch.bool:
        return torch.equal(mask, later)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill_(later, -torch.inf))


def hidden_keys(key_padding_mask: Tensor) -> Tensor:
    """bool: which keys does a mask in torch.nn's convention hide?"""
    return key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask == -torch.inf


def is_of_keys(keep: Tensor) -> bool:
    """Is a mask over [B,H,L,S] the same for all heads and queries?"""
    return keep.dim() == 4 and keep.shape[1:3] == (1, 1)


def padding_of(key_padding_mask: Tensor | None, mask: Any, shape: Shape, batched: bool) -> Tensor | None:
    """bool [B,S], or [S] unbatched: the padding that a call names, by ``key_padding_mask`` or in a ``Mask``."""
    if key_padding_mask is not None:
        return hidden_keys(key_padding_mask)
    if not isinstance(mask, Mask):
        return None
    B, _, _, S = shape
    hidden = None
    if mask.keep is not None and is_of_keys(mask.keep):
        hidden = ~mask.keep[:, 0, 0]
    if mask.key_lengths is not None:
        beyond = torch.arange(S, device=mask.key_lengths.device) >= mask.key_lengths[:, None]
        hidden = beyond if hidden is None else hidden | beyond
    if hidden is None:
        return None
    return hidden.expand(B, S) if batched else hidden[0]


def _without_zeros(mask: Tensor) -> Tensor:
    """A floating-point mask that adds nothing but 0 and -inf as bool, another as it is. On CPU only: anywhere else
    looking at it would stall the device."""
    if not mask.is_floating_point() or mask.device.type != "cpu" or not _is_constant(mask):
        return mask
    hidden = hidden_keys(mask)
    return hidden if torch.equal(hidden, mask != 0) else mask


def _is_constant(mask: Tensor) -> bool:
    """Is it known what the mask holds, and the same for every call?"""
    return not mask.requires_grad and plain_eager((mask,))


def _is_additive(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.is_floating_point()
