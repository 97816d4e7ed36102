"""PTX's types: how wide they are, and which C++ type holds one."""

from __future__ import annotations

WIDTH = {
    "pred": 1,
    **dict.fromkeys(("b8", "u8", "s8"), 8),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "tf32", "f16x2", "bf16x2"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 64),
    "b128": 128,
}
FLOATS = ("f32", "f64", "f16", "bf16")
_SPECIAL = {"pred": "bool", "f32": "float", "f64": "double", "f16": "half", "bf16": "bfloat16", "b128": "Bits128"}


def cpp(type: str) -> str:
    """The C++ type of a value of PTX type ``type``: pairs of 16-bit floats are 32 bits."""
    if type in _SPECIAL:
        return _SPECIAL[type]
    return f"{'int' if type[0] == 's' else 'uint'}{WIDTH[type]}_t"


def unsigned(type: str) -> str:
    return "bool" if type == "pred" else "Bits128" if type == "b128" else f"uint{WIDTH[type]}_t"


def integral(cpp_type: str) -> bool:
    return cpp_type == "bool" or cpp_type.startswith(("int", "uint"))


def cast(value: str, source: str, target: str) -> str:
    """``value``, whose C++ type is ``source``, as ``target``; integers by C++'s own conversion, the rest bit by bit.

    Plain expressions rather than templates: a kernel has thousands, and the compiler's time is the tests' time.
    """
    if source == target:
        return value
    if integral(source) and integral(target):
        return f"{target}({value})"
    return f"bits<{target}>({value})"
