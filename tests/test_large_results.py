"""The memory of large results of the CPU kernels: kept for the next, and otherwise that of any tensor."""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import threading

import pytest
import torch

from pytransformer import ops
from pytransformer._parity import unwritten_is_nan
from pytransformer.backends import cpu

if sys.platform != "linux":
    pytest.skip("nothing is kept on this system", allow_module_level=True)
_memory = pytest.importorskip("pytransformer.backends.cpu._memory", reason="the CPU kernels are not built")
ROWS, WIDTH = 1024, 768  # 3 MB in float32


def result(value=1.0, rows=ROWS, dtype=torch.float32):
    x = torch.full((rows, WIDTH), value, dtype=dtype)
    return ops.layer_norm(x, None, torch.full((WIDTH,), value, dtype=dtype), backend="cpu")


@pytest.fixture(autouse=True)
def _nothing_is_kept():
    cpu.empty_cache()
    yield
    cpu.empty_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_next_result_lies_where_the_last_one_did(dtype):
    first = result(2.0, 2 * ROWS, dtype)
    place = first.data_ptr()
    assert place % 2**21 == 0
    assert first.dtype == dtype
    assert first.is_contiguous()
    assert not first._is_view()
    del first
    again = result(3.0, 2 * ROWS, dtype)
    assert again.data_ptr() == place
    assert (again == 3).all()


def test_what_is_in_use_is_not_given_away():
    kept = [result(float(i)) for i in range(4)]
    view = kept.pop()[5:]
    more = [result(10.0 + i) for i in range(4)]
    assert len({x.data_ptr() // 2**21 for x in (*kept, view, *more)}) == 8
    assert all((x == i).all() for i, x in enumerate((*kept, view)))


def test_memory_much_larger_than_a_result_is_left_to_larger_ones():
    large = result(rows=8 * ROWS)
    place = large.data_ptr()
    del large
    small = result()
    assert small.data_ptr() != place
    assert result(rows=8 * ROWS - 100).data_ptr() == place


def test_empty_cache_says_what_it_gave_back():
    a, b = result(), result(rows=4 * ROWS)
    assert cpu.empty_cache() == 0, "both are in use"
    del a, b
    assert cpu.empty_cache() == 4 * 2**20 + 12 * 2**20
    assert cpu.empty_cache() == 0


def test_a_quarter_of_the_machines_memory_is_kept_at_most():
    quarter = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 4
    unwritten = [_memory.empty((quarter // 12,), torch.float32) for _ in range(5)]  # each a third of a quarter
    assert len(unwritten) == 5
    del unwritten
    assert cpu.empty_cache() <= quarter  # less in a container that may have less


def test_a_result_is_a_tensor_like_any_other():
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    y = ops.layer_norm(x, None, backend="cpu")
    y += 1  # in place, under autograd
    y.sum().backward()
    assert x.grad.shape == x.shape
    same = y.detach().numpy().copy()
    assert (copy.deepcopy(y.detach()).numpy() == same).all()
    assert (y.detach().share_memory_().numpy() == same).all()
    with torch.inference_mode():
        assert ops.layer_norm(x, None, backend="cpu").is_inference()


def test_filled_where_torch_fills_uninitialised_memory():
    with unwritten_is_nan():
        assert _memory.empty((ROWS, WIDTH)).isnan().all()


def test_threads_do_not_meet_in_the_same_memory():
    wrong = []

    def work(value):
        for i in range(40):
            y = result(value + i)
            if not (y == value + i).all():
                wrong.append((value, i))

    threads = [threading.Thread(target=work, args=(100.0 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(y, queue):
    queue.put((float(y[0, 0]), y.data_ptr()))
    del y
    queue.put(float(_memory.empty((8, ROWS, WIDTH))[0, 0].fill_(7.0)[-1]))


def test_a_forked_child_has_its_own():
    context = multiprocessing.get_context("fork")
    y, idle = result(5.0), result()
    del idle
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(y, queue), daemon=True)
    child.start()
    assert queue.get(timeout=60) == (5.0, y.data_ptr())
    assert queue.get(timeout=60) == 7.0
    child.join(10)
    assert child.exitcode == 0
    assert (y == 5).all()
    assert (result(6.0) == 6).all()
