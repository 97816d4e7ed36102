"""What Triton compiles anew, and what it does not: lengths do not matter, the precision of float32 does.

Launches are recorded over tensors without memory and keyed as Triton's launcher keys them, or compiled to its IR.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from triton_table import attention, empty, ffn, linear_cross_entropy, rng
from triton_table import decode as decode_case

from pytransformer import backends

pytestmark = pytest.mark.skipif(
    backends.unavailable("triton") == "triton is not installed", reason="triton is not installed"
)
ARCH = "sm90"
LENGTHS = (1, 15, 16, 17, 1024)


def specialisations(calls):
    """By kernel, the keys of what it would be compiled for, in all of ``calls``."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from pytransformer.kernels import _offline

    backend = make_backend(_offline.TARGETS[ARCH])
    found = defaultdict(set)
    for call in calls:
        with _offline.recorded(ARCH) as launches:
            call()
        for launch in launches:
            bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
            _, specialisation, options = bind(**launch.arguments, **launch.options)
            found[launch.name].add((str(specialisation), str(options)))
    return found


def attend(T, S, head_dim=64, mask=None, dropout=False, bias=False, lengths=False, layout="BHTD"):
    """Forward and backward of T queries over S keys; ``mask``: ``"keys"`` or ``"any"``."""
    from pytransformer.kernels import attention as kernels
    from pytransformer.kernels import attention_bwd

    def heads(length):
        if layout == "BHTD":
            return empty(2, 4, length, head_dim, dtype=torch.bfloat16)
        return empty(2, length, 4, head_dim, dtype=torch.bfloat16).transpose(1, 2)

    q, k = heads(T), heads(S)
    keep = None if mask is None else empty(2, 1, 1 if mask == "keys" else T, S, dtype=torch.bool).expand(2, 4, T, S)
    added = empty(2, 4, T, S, dtype=torch.bfloat16) if bias else None
    masks = kernels.masking(keep, added, empty(2, dtype=torch.int64) if lengths else None, None, 0)
    softmax = kernels.Softmax(0.1, 0.0, 0.1 if dropout else 0.0, rng() if dropout else None)
    out, lse = kernels.attention_fwd(q, k, k, masks, softmax)
    *_, delta = attention_bwd.attention_bwd(q, q, k, k, out, lse, masks, softmax)
    if bias:
        attention_bwd.attention_dbias(torch.Size([2, 4, 1, S]), q, q, k, k, lse, delta, masks, softmax)


CALLS = {
    "causal": {},
    "lengths": {"lengths": True},
    "key padding": {"mask": "keys"},
    "bool mask": {"mask": "any"},
    "[B,T,H,D]": {"layout": "BTHD"},
    "head dim 40": {"head_dim": 40},
    "head dim 72, masked": {"head_dim": 72, "mask": "any"},
}
ATTENTION = {"forward_kernel", "delta_kernel", "dq_kernel", "dkv_kernel"}


@pytest.mark.parametrize("case", CALLS)
def test_attention_is_compiled_once_for_all_lengths(case):
    options = CALLS[case]
    once = specialisations([lambda: attend(1024, 1024, **options)])
    assert once.keys() >= ATTENTION
    lengths = [(T, S) for T in LENGTHS for S in LENGTHS if T == S or 17 in (T, S)]
    found = specialisations(lambda T=T, S=S: attend(T, S, **options) for T, S in lengths)
    for kernel, keys in found.items():
        # Lists are made for the tiles of several kernels; a mask of one query is packed by whole rows, transposed it is
        # one that serves all queries, and rows of multiples of eight are packed by eight elements at a time.
        rows = kernel in ("pack_kernel", "transpose_kernel", "dkv_kernel") and options.get("mask") == "any"
        assert len(keys) == len(once[kernel]) + rows + (kernel == "pack_kernel"), kernel


def attend_varlen(N, longest, at_end=True):
    """Forward and backward of N sequences end to end, and few queries over them."""
    from pytransformer.kernels import attention as kernels
    from pytransformer.kernels import attention_bwd, attention_decode

    total = N * longest - N // 2

    def heads(tokens, length):
        return (
            empty(1, tokens, 4, 64, dtype=torch.bfloat16).transpose(1, 2).narrow(2, 0, length).expand(N, 4, length, 64)
        )

    def masks(total_q):
        cu = empty(N + 1, dtype=torch.int32)
        return kernels.masking(None, None, None, -9, 0, sequences=kernels.Sequences(cu, cu, total_q, total, at_end))

    q, softmax = heads(total, longest), kernels.Softmax(0.1, 0.0, 0.0, None)
    out, lse = kernels.attention_fwd(q, q, q, masks(total), softmax)
    attention_bwd.attention_bwd(q, q, q, q, out, lse, masks(total), softmax)
    attention_decode.attention_decode(heads(N, 1), q, q, masks(N), softmax, max(1, longest // 64))


def test_sequences_end_to_end_compile_once():
    """Whatever they are, how many, how long in all, and from which end the band counts."""
    found = specialisations(
        lambda N=N, n=n, end=end: attend_varlen(N, n, end)
        for N in (1, 7, 16)
        for n in LENGTHS[1:]
        for end in (False, True)
    )
    assert found.keys() == {*ATTENTION, "split_kernel", "combine_kernel"}
    assert {kernel for kernel, keys in found.items() if len(keys) > 1} == set()


@pytest.mark.parametrize("options", [{"dropout": True}, {"bias": True}, {"dropout": True, "bias": True}])
def test_dropout_and_bias_compile_once_more_for_multiples_of_eight_and_four(options):
    """Eight neighbours share random words, and a bias is loaded four at a time where its rows allow it."""
    for lengths in ((1, 15, 17, 1023), (20, 36, 1028), (16, 24, 1024)):
        found = specialisations(lambda S=S: attend(S, S, **options) for S in lengths)
        assert {kernel for kernel, keys in found.items() if len(keys) > 1} == set(), lengths


def decode(S):
    from pytransformer.kernels import attention as kernels
    from pytransformer.kernels import attention_decode

    q, k = empty(2, 8, 1, 64, dtype=torch.bfloat16), empty(2, 4, S, 64, dtype=torch.bfloat16)
    masks = kernels.masking(None, None, empty(2, dtype=torch.int64), None, None)
    softmax = kernels.Softmax(0.1, 0.0, 0.0, None)
    attention_decode.attention_decode(q, k, k, masks, softmax, max(1, S // 64))


def decode_in_pages(P):
    from pytransformer.kernels import attention as kernels
    from pytransformer.kernels import attention_decode

    q, pool = empty(2, 8, 1, 64, dtype=torch.bfloat16), empty(7 * P, 4, 16, 64, dtype=torch.bfloat16)
    masks = kernels.masking(None, None, empty(2, dtype=torch.int64), None, 0)
    table = empty(2, P, dtype=torch.int32)
    softmax = kernels.Softmax(0.1, 0.0, 0.0, None)
    attention_decode.attention_decode(q, pool, pool, masks, softmax, max(1, P // 4), table)


def norm(N):
    from pytransformer.kernels import layer_norm

    x, vector = empty(N, 768, dtype=torch.bfloat16), empty(768, dtype=torch.bfloat16)
    _, z, mean, rstd = layer_norm.layer_norm_fwd(x, vector, vector, x, vector, rng(), 0.1, 1e-5, False, True)
    layer_norm.layer_norm_bwd(x, x, z, vector, mean, rstd, rng(), 0.1, False)


def feed_forward(N):
    from pytransformer.kernels import ffn

    x, weight, h = (empty(*shape, dtype=torch.bfloat16) for shape in ((N, 768), (3072, 768), (N, 3072)))
    for fused in (True, False):
        ffn.hidden_fwd(x, weight, None, None, None, rng(), "gelu", 0.1, True, fused)
        ffn.hidden_bwd(x, weight.mT.contiguous(), h, None, rng(), "gelu", 0.1, fused)


def loss(N):
    from pytransformer.backends.triton import linear_cross_entropy as backend

    x, weight = empty(N, 768, dtype=torch.bfloat16), empty(50257, 768, dtype=torch.bfloat16)
    target = empty(N, dtype=torch.int64)
    backend.linear_cross_entropy_fwd(x, weight, None, target, "mean", -100, 0.0, 0.0, 0.0, [True, True, False])


def embed(N):
    from pytransformer.kernels import embedding

    for outer, T in ((N, 16), (16, N)):
        tokens, weight = empty(outer, T, dtype=torch.int64), empty(30522, 100, dtype=torch.bfloat16)
        positions = empty(T, 100, dtype=torch.bfloat16)
        y = embedding.embedding_fwd(tokens, weight, positions, None, None, rng(), 2.0, 0.1)
        embedding.embedding_fwd(tokens, weight, y, None, None, rng(), 2.0, 0.1)
        embedding.table_gradient(y.view(-1, 100), tokens.flatten(), weight, rng(), 1.0, 0.1)
        embedding.position_gradient(y, rng(), 0.1)


@pytest.mark.parametrize("call", [norm, feed_forward, loss, embed, decode, decode_in_pages])
def test_rows_do_not_compile_anew(call):
    found = specialisations(lambda n=n: call(n) for n in (*LENGTHS, 2500, 8192))
    shared = {"forward_kernel"} if call is embed else set()  # positions that all share, and each its own
    for kernel, keys in found.items():
        assert len(keys) == (2 if kernel in shared else 1), kernel


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_heads_whose_rows_32_bits_do_not_reach_are_refused(which):
    from pytransformer.backends.triton import attention as backend

    def why_not(rows):
        heads = {name: empty(1, 1, rows, 64, dtype=torch.bfloat16) for name in ("query", "key", "value")}
        heads[which] = torch.empty_strided((1, 1, rows, 64), (0, 0, 2**14, 1), dtype=torch.bfloat16, device="meta")
        return backend.why_not(*heads.values(), None, None, None, None, None, 0, 0.1, 0.0, 0.0)

    assert why_not(2**17) is None
    assert "2147483648 elements apart" in why_not(2**17 + 1)


WITH_PRODUCTS = {
    "attention": (
        lambda dtype: attention(dtype, 64, "everything"),
        {"forward_kernel", "dq_kernel", "dkv_kernel", "dbias_kernel"},
    ),
    "decode": (lambda dtype: decode_case(dtype, 64), {"split_kernel"}),
    "ffn": (lambda dtype: ffn(dtype, "silu", True), {"hidden_kernel", "hidden_backward_kernel"}),
    "linear_cross_entropy": (linear_cross_entropy, {"accumulate_kernel"}),
}


@pytest.fixture
def precision():
    """Sets the precision of float32 products by either of torch's interfaces, and puts it back."""
    matmul = torch.backends.cuda.matmul

    def use(interface, wanted):
        if interface == "fp32_precision":
            matmul.fp32_precision = wanted
        else:
            matmul.allow_tf32 = wanted == "tf32"

    yield use
    matmul.fp32_precision = "ieee"
    matmul.allow_tf32 = False


@pytest.mark.parametrize("wanted", ["ieee", "tf32"])
@pytest.mark.parametrize("op", WITH_PRODUCTS)
def test_every_product_has_the_precision_that_torch_is_set_to(precision, op, wanted):
    from pytransformer.kernels import _offline

    precision("fp32_precision", wanted)
    call, kernels = WITH_PRODUCTS[op]
    with _offline.recorded(ARCH) as launches:
        call(torch.float32)
    seen = set()
    for launch in {launch.name: launch for launch in launches}.values():
        products = [line for line in launch.ir(ARCH).splitlines() if "tt.dot " in line]
        if products:
            seen.add(launch.name)
        for line in products:
            assert ("inputPrecision = tf32" in line) == (wanted == "tf32"), f"{launch.name}: {line}"
    assert seen == kernels


@pytest.mark.parametrize("interface", ["fp32_precision", "allow_tf32"])
def test_both_of_torchs_interfaces_are_read(precision, interface):
    from pytransformer.kernels._common import float32_precision

    for wanted in ("tf32", "ieee", "tf32"):
        precision(interface, wanted)
        assert float32_precision() == wanted


def test_true_float32_is_the_default():
    from pytransformer.kernels._common import float32_precision

    assert float32_precision() == "ieee"
