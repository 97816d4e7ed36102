"""Long calls of the CPU kernels look for signals: Ctrl-C ends them, and nothing is the worse for it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch

from pytransformer import ops
from pytransformer.ops.attention import UNPACKED


class EndedError(Exception):
    pass


def attention(size: int) -> Callable[[], torch.Tensor]:
    q = torch.randn(1, 2, size, 64)
    return lambda: ops.attention(q, q, q, backend="cpu")


def attention_backward(size: int) -> Callable[[], torch.Tensor]:
    from pytransformer.backends.cpu.attention import attention_bwd

    x, lse = torch.randn(1, 2, size, 64), torch.zeros(1, 2, size)
    numbers = (None, None, 0.125, 0.0, 0.0)  # band, scale, softcap, dropout_p
    return lambda: attention_bwd(x, x, x, x, x, lse, *[None] * 4, *numbers, *UNPACKED, False)[0]


def ffn(size: int) -> Callable[[], torch.Tensor]:
    x, weight = torch.randn(size, 2048), torch.randn(8192, 2048)
    return lambda: ops.ffn(x, weight, None, weight.T.contiguous(), None, backend="cpu")


def linear_cross_entropy(size: int) -> Callable[[], torch.Tensor]:
    x, weight, target = torch.randn(size, 512), torch.randn(32768, 512), torch.randint(0, 32768, (size,))
    return lambda: ops.linear_cross_entropy(x, weight, target, backend="cpu")


@pytest.fixture
def alarm():
    def end(*_):
        raise EndedError

    before = signal.signal(signal.SIGALRM, end)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=[1, 2], ids=["1_thread", "2_threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers of signals here")
@pytest.mark.parametrize(
    ("make", "size"),
    [(attention, 65536), (attention_backward, 65536), (ffn, 32768), (linear_cross_entropy, 65536)],
)
def test_a_signal_ends_a_long_call(alarm, threads, make, size):
    call, small = make(size), make(8)
    wanted = small()
    alarm(0.1)
    began = time.perf_counter()
    with pytest.raises(EndedError):
        call()
    # Whole, each takes ten seconds of two cores and more; a block of one takes milliseconds.
    assert time.perf_counter() - began < 3
    torch.testing.assert_close(small(), wanted)


def test_a_signal_without_consequence_does_not():
    q = torch.randn(1, 2, 4096, 64)
    wanted = ops.attention(q, q, q, backend="cpu")
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(True))
    try:
        timer = threading.Timer(0.06, lambda: signal.raise_signal(signal.SIGUSR1))
        timer.start()
        while not seen:
            assert torch.equal(ops.attention(q, q, q, backend="cpu"), wanted)
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers of signals here")
def test_a_handler_may_call_kernels_itself(alarm):
    call, small, seen = attention(65536), attention(8), []

    def handle(*_):
        small()
        seen.append(True)
        if len(seen) == 2:
            raise EndedError
        alarm(0.1)

    signal.signal(signal.SIGALRM, handle)
    alarm(0.1)
    began = time.perf_counter()
    with pytest.raises(EndedError):
        call()
    assert len(seen) == 2
    assert time.perf_counter() - began < 3


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers of signals here")
def test_a_call_of_the_handler_is_whole_or_ends(alarm, threads):
    call, own = attention(65536), attention(8192)
    wanted, whole = own(), []

    def handle(*_):
        whole.append(None)
        if len(whole) == 1:
            alarm(0.02)
            whole[0] = torch.equal(own(), wanted)
        raise EndedError

    signal.signal(signal.SIGALRM, handle)
    alarm(0.1)
    with pytest.raises(EndedError):
        call()
    assert whole[0] is not False
