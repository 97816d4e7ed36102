"""The shared memory that launches ask for is what the committed table says, where ``test_cuda_table.py`` judges it."""

from __future__ import annotations

import re

import cuda_table
import pytest

from ptx import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


def test_the_table_has_what_launches_ask_for():
    from ptx import shared_memory

    _, _, *rows = cuda_table.TABLE.read_text().splitlines()
    halves = [row.rsplit(maxsplit=1) for row in rows]
    table = {re.sub(cuda_table.ARCH_AND_FIGURES, "", row): int(dynamic) for row, dynamic in halves}
    found = shared_memory.largest()
    changed = sorted(name for name in table.keys() | found.keys() if table.get(name) != found.get(name))
    assert not changed, "run `make cuda-table` and review the change:\n" + "\n".join(
        f"{name}: {table.get(name)} in the table, asked for {found.get(name)}" for name in changed
    )
