"""The random bits of dropout, which every backend is held to by the tests of the ops."""

from __future__ import annotations

import pytest
import torch

from pytransformer.reference import dropout_multiplier
from pytransformer.reference._philox import philox

RNG = torch.tensor([2024, 7])


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


# Random123's known answers for philox4x32 with 7 rounds: counter, key, result.
@pytest.mark.parametrize(
    ("block", "offset", "seed", "wanted"),
    [
        (0, 0, 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (-1, -1, -1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            0x85A308D3_243F6A88,
            0x03707344_13198A2E,
            0x299F31D0_A4093822,
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_known_answers(block, offset, seed, wanted):
    words = philox(torch.tensor([signed(block)]), torch.tensor([signed(seed), signed(offset)]))
    assert words.tolist() == [list(wanted)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_what_is_dropped_has_its_share_and_no_pattern(p):
    count = 2**20
    kept = dropout_multiplier((count,), RNG, p, torch.float64) > 0
    dropped = (~kept).double() - p
    spread = (p * (1 - p)) ** 0.5  # of one element; the sums below are of independent ones
    for distance in range(9):
        product = dropped if distance == 0 else dropped[distance:] * dropped[:-distance]
        bound = 5 * spread ** (2 if distance else 1) / count**0.5
        assert abs(product.mean()) < bound, f"elements {distance} apart"
    for place in range(8):
        assert abs(dropped[place::8].mean()) < 5 * spread / (count / 8) ** 0.5, f"number {place} of the blocks"


@pytest.mark.parametrize(
    ("p", "scale"),
    [
        (0.25, 4 / 3),
        (0.1, 2**16 / (2**16 - 6554)),
        (1 - 2**-16, 2**16),
        (1 - 2**-18, 0),  # rounds to 1
        (1.0, 0),
        (2**-18, 1),  # rounds to 0
    ],
)
def test_kept_elements_are_scaled_by_what_is_in_fact_dropped(p, scale):
    values = dropout_multiplier((2**20 + 3,), RNG, p, torch.float64).unique()
    assert set(values.tolist()) <= {0.0, float(scale)}
    assert float(scale) in values
