"""PTX text to C++: what nvcc or Triton emitted becomes a function that a CPU runs once for every GPU thread.

``parse`` reads the text into statements and knows nothing of what they mean. ``function`` turns one kernel into one
C++ function: a PTX register becomes a local variable, a branch a ``goto``, an instruction a few lines over
``runtime/instructions.h`` (what a thread does alone) and ``runtime/machine.h`` (what needs other threads or memory).
What an opcode becomes stands in ``arithmetic``, ``memory`` and ``cooperation``, one function for each family of
opcodes; an opcode or modifier without one is an error that names its line, never a guess.
"""

from __future__ import annotations

import importlib

from ptx.translate.function import Translation, translate
from ptx.translate.parse import Module, UnsupportedError, parse

for _family in ("arithmetic", "cooperation", "memory"):  # each registers its opcodes
    importlib.import_module(f"ptx.translate.{_family}")

__all__ = ["Module", "Translation", "UnsupportedError", "parse", "translate"]
