"""PTX text to C++: what nvcc or Triton emitted becomes a function that a CPU runs once for every GPU thread.

``parse`` reads the text into statements and knows nothing of what they mean. ``function`` turns one kernel into one
C++ function: a PTX register becomes a local variable, a branch a ``goto``, an instruction a few lines over
``runtime/instructions.h`` (what a thread does alone) and ``runtime/machine.h`` (what needs other threads or memory).
What an opcode becomes stands in ``arithmetic``, ``memory``, ``cooperation`` and ``hopper``, one function for each
family of opcodes; an opcode or modifier without one is an error that names its line, never a guess.
"""

from __future__ import annotations

from ptx.translate import arithmetic as _arithmetic
from ptx.translate import cooperation as _cooperation
from ptx.translate import memory as _memory
from ptx.translate.function import Translation, translate
from ptx.translate.parse import Module, Unsupported, parse

__all__ = ["Module", "Translation", "Unsupported", "parse", "translate"]
