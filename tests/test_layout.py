"""The shape of the tree: imports look down, and an op has the same name in every layer."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pytransformer
from pytransformer import backends

ROOT = Path(__file__).parent.parent
PACKAGE = Path(pytransformer.__file__).parent

# What the GPU backends share: arguments, and what they leave to torch's products.
BESIDE_TORCH = ("backends._arguments", "backends._products", "backends._loss_by_chunks")

# Each layer and what it may import of pytransformer; the first entry that matches a module's name is its layer.
LAYERS = {
    "kernels": {"kernels"},
    "reference": {"reference"},
    "backends.cpu": {"backends.cpu", "backends._arguments", "backends._tracing", "_cpu"},
    "backends.cuda": {"backends.cuda", *BESIDE_TORCH, "_cuda"},
    "backends.triton": {"backends.triton", *BESIDE_TORCH, "kernels"},
    "backends._loss_by_chunks": {"backends._arguments"},
    "backends": {"backends._tracing"},
    "masks": set(),
    "ops": {"ops", "backends", "masks", "reference"},
    "nn": {"nn", "ops", "masks", "backends"},
    "models": {"models", "nn", "ops", "masks", "backends"},
    "generation": {"generation", "models", "nn", "ops", "masks", "backends"},
    "viz": set(),
    "integrations": {"integrations", "models", "nn", "ops", "masks", "backends"},
}


def modules():
    for root, prefix in ((PACKAGE, ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(root.rglob("*.py")):
            name = prefix + ".".join(path.relative_to(root).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def layer_of(name):
    return next((layer for layer in LAYERS if name == layer or name.startswith(layer + ".")), None)


def imported(path):
    """Names below pytransformer that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            plain = node.module != "pytransformer"
            names = [node.module] if plain else [f"pytransformer.{alias.name}" for alias in node.names]
        else:
            assert not isinstance(node, ast.ImportFrom), f"{path}: relative import in line {node.lineno}"
            continue
        yield from (name.removeprefix("pytransformer.") for name in names if name.startswith("pytransformer."))


CHECKED = [(name, path) for name, path in modules() if layer_of(name)]


@pytest.mark.parametrize(("name", "path"), CHECKED, ids=[name for name, _ in CHECKED])
def test_imports_look_down(name, path):
    allowed = LAYERS[layer_of(name)]
    for target in imported(path):
        fits = any(target == a or target.startswith(a + ".") for a in allowed)
        assert fits or target == layer_of(name), f"{name} ({layer_of(name)}) must not import pytransformer.{target}"


@pytest.mark.parametrize("op", backends.OPS)
def test_every_op_has_its_files(op):
    for folder in ("pytransformer/ops", "pytransformer/reference", "benchmarks"):
        assert (ROOT / folder / f"{op}.py").exists(), f"{folder}/{op}.py is missing"
    assert (ROOT / "tests" / f"test_{op}.py").exists(), f"tests/test_{op}.py is missing"


def stems(folder, suffix):
    return {path.stem for path in (ROOT / folder).glob(f"*{suffix}")}


def owner(stem):
    """The op that a file belongs to, that with the longest name: linear_cross_entropy.cpp is none of linear's."""
    return max((op for op in backends.OPS if stem == op or stem.startswith(op + "_")), key=len, default=None)


def of_op(op, names):
    return {name for name in names if owner(name) == op}


@pytest.mark.parametrize("op", backends.OPS)
def test_a_compiled_op_is_whole(op):
    """An adapter has its kernel, header and binding, and each of these has its adapter."""
    found = {
        f"pytransformer/backends/cpu/{op}.py": op in stems("pytransformer/backends/cpu", ".py"),
        f"csrc/cpu/{op}.cpp": op in stems("csrc/cpu", ".cpp"),
        f"csrc/include/{op}.h": op in stems("csrc/include", ".h"),
        f"csrc/bindings/{op}.cpp": op in stems("csrc/bindings", ".cpp"),
    }
    assert all(found.values()) or not any(found.values()), found


@pytest.mark.parametrize("op", backends.OPS)
def test_a_cuda_op_is_whole(op):
    bound = {op, f"{op}_cuda"} & stems("csrc/bindings", ".cpp")
    found = {
        f"pytransformer/backends/cuda/{op}.py": op in stems("pytransformer/backends/cuda", ".py"),
        f"csrc/cuda/{op}*.cu": bool(of_op(op, stems("csrc/cuda", ".cu"))),
    }
    assert all(found.values()) or not any(found.values()), found
    assert bound or not any(found.values()), f"csrc/bindings has neither {op}.cpp nor {op}_cuda.cpp"


def test_no_file_is_without_an_op():
    known = {
        "csrc/cpu": {"dispatch", "kernels", "large_memory", "peak"},
        "csrc/bindings": {"cpu", "cuda", "large_memory", "peak"},
    }
    for folder, others in known.items():
        for stem in stems(folder, ".cpp") - others:
            assert owner(stem), f"{folder}/{stem}.cpp belongs to no op"
    for stem in stems("csrc/cuda", ".cu") - {"device", "tensor_map_sm90"}:
        assert owner(stem), f"csrc/cuda/{stem}.cu belongs to no op"
    for folder in ("pytransformer/backends/cpu", "pytransformer/backends/cuda", "kernels", "pytransformer/ops"):
        for stem in {s for s in stems(folder, ".py") if not s.startswith("_")}:
            assert owner(stem), f"{folder}/{stem}.py belongs to no op"


def test_only_the_bindings_know_pybind11_and_nothing_knows_libtorch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        text = path.read_text()
        assert "#include <torch" not in text, path
        assert "#include <ATen" not in text, path
        assert path.parent.name == "bindings" or "pybind11" not in text, path
