"""Selection of a backend, its explanation, and a half-built install."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

import pytransformer
from pytransformer import BackendError, backends, ops, use_backend

X, WEIGHT = torch.ones(2, 8), torch.ones(8)
built = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU kernels are not built")


@built
def test_explain():
    explanation = pytransformer.explain(ops.layer_norm, X, WEIGHT)
    assert str(explanation) == "layer_norm: cpu"
    assert torch.equal(explanation.result, ops.layer_norm(X, WEIGHT))
    text = str(pytransformer.explain(ops.layer_norm, X.double(), WEIGHT.double()))
    assert text == "layer_norm: reference\n    not cpu: it takes float32, float16 and bfloat16, not torch.float64"


@built
def test_explain_counts_calls_of_a_model():
    def model():
        for _ in range(3):
            ops.layer_norm(X, WEIGHT)
        return ops.layer_norm(X, WEIGHT, backend="reference")

    text = str(pytransformer.explain(model))
    assert text == "layer_norm: cpu  (3 calls)\nlayer_norm: reference"
    assert str(pytransformer.explain(lambda: 1)) == "no pytransformer op was called"


def test_use_backend():
    def ran():
        return pytransformer.explain(ops.layer_norm, X, WEIGHT).decisions[0].backend

    outside = ran()
    with use_backend("reference"):
        assert ran() == "reference"
        with use_backend("auto"):
            assert ran() == outside
        assert ran() == "reference"
    assert ran() == outside
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert ran() == outside


@built
def test_an_argument_beats_use_backend():
    with use_backend("reference"):
        decisions = pytransformer.explain(ops.layer_norm, X, WEIGHT, backend="cpu").decisions
    assert decisions[0].backend == "cpu"


def test_use_backend_is_of_one_thread():
    found = []
    with use_backend("reference"):
        thread = threading.Thread(
            target=lambda: found.append(pytransformer.explain(ops.layer_norm, X, WEIGHT).decisions[0].backend)
        )
        thread.start()
        thread.join()
    assert found == [pytransformer.explain(ops.layer_norm, X, WEIGHT).decisions[0].backend]


@pytest.mark.parametrize("name", ["nonsense", "", "CPU"])
def test_unknown_names(name):
    message = f"backend must be 'auto' or one of 'cuda', 'triton', 'cpu', 'reference'; got {name!r}"
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ops.layer_norm(X, WEIGHT, backend=name)
    assert str(caught.value) == message
    with pytest.raises(ValueError) as caught, use_backend(name):  # noqa: PT011
        pass
    assert str(caught.value) == message


Q = torch.ones(1, 2, 3, 4)
W = torch.ones(4, 4)
REFUSED = [
    ("layer_norm", (X.double(), WEIGHT.double()), {}, "it takes float32, float16 and bfloat16, not torch.float64"),
    ("layer_norm", (X, WEIGHT.double()), {}, "weight must be float32 or torch.float32, not torch.float64"),
    ("attention", (Q.double(),) * 3, {}, "it takes float32, float16 and bfloat16, not torch.float64"),
    ("attention", (Q,) * 3, {"bias": torch.ones(3, 3).double()}, "bias must be float32 or torch.float32"),
    (
        "ffn",
        (X.double(), torch.ones(4, 8).double(), None, W.double(), None),
        {},
        "it takes float32, float16 and bfloat16, not torch.fl",
    ),
]


@built
@pytest.mark.parametrize(
    ("op", "args", "options", "reason"), REFUSED, ids=[f"{op}-{r[:30]}" for op, _, _, r in REFUSED]
)
def test_a_named_backend_never_falls_back(op, args, options, reason):
    with pytest.raises(BackendError) as caught:
        getattr(ops, op)(*args, **options, backend="cpu")
    assert str(caught.value).startswith(f"{op}: backend 'cpu' cannot serve this call: {reason}")
    with pytest.raises(BackendError), use_backend("cpu"):
        getattr(ops, op)(*args, **options)
    getattr(ops, op)(*args, **options)  # auto takes the reference


@built
def test_a_backend_yields_to_a_faster_one_unless_asked_for_by_name(monkeypatch):
    """Inputs of a width of their own: what is chosen for a signature is remembered."""
    module, x, weight = backends.implementation("cpu", "layer_norm"), torch.ones(2, 13), torch.ones(13)
    monkeypatch.setattr(module, "yields_to", lambda *_: ("reference", "planted"), raising=False)
    assert str(pytransformer.explain(ops.layer_norm, x, weight)) == "layer_norm: reference\n    not cpu: planted"
    assert str(pytransformer.explain(ops.layer_norm, x, weight, backend="cpu")) == "layer_norm: cpu"
    monkeypatch.setattr(module, "yields_to", lambda *_: ("triton", "planted"))
    assert str(pytransformer.explain(ops.layer_norm, x, weight)) == "layer_norm: cpu"  # which Triton cannot serve


@built
def test_a_compiled_call_yields_too(monkeypatch):
    module, x, weight = backends.implementation("cpu", "layer_norm"), torch.ones(2, 14), torch.ones(14)
    monkeypatch.setattr(module, "yields_to", lambda x, *_: ("reference", "planted"), raising=False)
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    torch.compile(ops.layer_norm, backend=keep, fullgraph=True)(x, weight)
    assert "pytransformer" not in graphs[0]


def test_cuda_kernels_leave_what_is_large_to_tritons_on_hopper(monkeypatch):
    """As the adapters decide it, on tensors without memory that say they are on a GPU."""
    pytest.importorskip("pytransformer._cuda", reason="the CUDA module is not built")
    from pytransformer.backends.cuda import _arguments as cuda

    attention, layer_norm = (backends.implementation("cuda", op) for op in ("attention", "layer_norm"))

    class OnGpu(torch.Tensor):
        is_cuda = True

    def heads(T, n=16):
        return torch.empty(1, n, T, 128, dtype=torch.bfloat16, device="meta").as_subclass(OnGpu)

    def of_attention(T, **packing):
        return attention.yields_to(*[heads(T)] * 3, *[None] * 6, 1.0, 0.0, 0.0, **packing)

    cu_seq, rows = torch.zeros(9), torch.empty(2**14, 2**10, device="meta").as_subclass(OnGpu)
    for capability, expected in (((9, 0), "triton"), ((10, 0), "triton"), ((8, 0), None), ((12, 0), None)):
        monkeypatch.setattr(cuda, "_capability", lambda _, found=capability: found)
        found = of_attention(2048), layer_norm.yields_to(rows, None)
        assert [x and x[0] for x in found] == [expected, expected]
        assert of_attention(512) is None
        assert of_attention(2048, cu_seq_q=cu_seq, cu_seq_k=cu_seq, max_q=256, max_k=256) is None
        assert layer_norm.yields_to(rows[:8], None) is None


def test_without_triton_everything_else_works():
    done = in_subprocess(
        """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from pytransformer import backends, ops
assert backends.unavailable("triton") == "triton is not installed"
assert backends.has_op("triton", "layer_norm")
assert backends.why_not("triton", "layer_norm", "cuda", ()) == "triton is not installed"
ops.layer_norm(torch.randn(3, 8), None)
"""
    )
    assert done.returncode == 0, done.stderr


def test_triton_is_not_imported_with_the_package():
    done = in_subprocess("import sys, pytransformer.ops, pytransformer.kernels; assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gpu_backends_refuse_cpu_tensors(name):
    with pytest.raises(BackendError, match="it has no kernels for tensors on 'cpu'"):
        ops.layer_norm(X, WEIGHT, backend=name)


def test_a_missing_kernel_is_a_reason():
    missing = [op for op in backends.OPS if not backends.has_op("cpu", op)]
    for op in missing:
        reason = backends.why_not("cpu", op, "cpu", ())
        assert reason == backends.unavailable("cpu") or reason == f"it has no {op} kernel yet"


@built
def test_functorch_and_layouts_are_reasons():
    decisions = []

    def call(x):
        with backends.record_decisions() as found:
            y = ops.layer_norm(x, WEIGHT)
        decisions.extend(found)
        return y

    torch.func.vmap(call)(X)
    assert decisions[0].backend == "reference"
    assert "functorch transform" in decisions[0].reasons["cpu"]


def in_subprocess(code):
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)


def test_a_half_built_install_warns_once_and_works():
    done = in_subprocess(
        """
import sys, warnings
sys.modules["pytransformer._cpu"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pytransformer
ours = [w for w in caught if "pytransformer" in str(w.message)]
assert len(ours) == 1, ours
assert ours[0].category is RuntimeWarning
text = str(ours[0].message)
assert text.startswith("pytransformer: the CPU kernels cannot be used: its module is not built ("), text
assert "\\n" not in text, text
import torch
from pytransformer import ops
x = torch.randn(3, 8, requires_grad=True)
explanation = pytransformer.explain(ops.layer_norm, x, None)
assert explanation.decisions[0].backend == "reference"
assert "not cpu: its module is not built" in str(explanation)
explanation.result.sum().backward()
q = torch.randn(1, 2, 3, 4)
ops.attention(q, q, q, is_causal=True)
try:
    ops.layer_norm(x, None, backend="cpu")
except pytransformer.BackendError as error:
    assert "its module is not built" in str(error)
else:
    raise SystemExit("backend='cpu' must raise")
"""
    )
    assert done.returncode == 0, done.stderr
