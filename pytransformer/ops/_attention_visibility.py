"""Which keys a query sees, for the modules that must extend a mask (nn may not reach below ops)."""

from pytransformer.reference.attention import visible_keys

__all__ = ["visible_keys"]
