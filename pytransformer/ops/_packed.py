"""What a backend made of a mask, kept beside the mask: twelve layers that are handed one mask pack it once.

A backend that packs masks says so (``PACKS_MASKS``) and is handed a dict with the mask, empty at first, to put into
what it makes of it. The dict goes with the mask's memory, and is another one when autograd's version counter says
that the mask was written to, for another view, on another stream.

It is left out where the counter cannot be trusted or the work must be done again: for inference tensors, while a
CUDA graph is captured (its replays must pack the mask that they find), and outside plain eager mode (compiled code
writes into its buffers behind the counter's back).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# By the tensor that owns the memory: its version, and a dict for each view, stream and backend.
_kept: Any = WeakIdKeyDictionary()


def packed_form(mask: Tensor, backend: str) -> dict[Any, Any] | None:
    """The dict of ``mask`` for ``backend``, or None where nothing may be remembered."""
    owner = mask if mask._base is None else mask._base
    if owner.is_inference():
        return None
    stream = 0
    if mask.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(mask.device).cuda_stream
    version, forms = _kept.get(owner, (None, {}))
    if version != owner._version:
        forms = {}
        _kept[owner] = owner._version, forms
    view = backend, stream, mask.storage_offset(), tuple(mask.shape), mask.stride()
    found: dict[Any, Any] = forms.setdefault(view, {})
    return found
