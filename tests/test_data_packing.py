"""How a stream of tokens becomes training lines."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookfar.data.packing import Lines
from lookfar.errors import UserError


def lines(count, context=1, seed=0):
    return Lines(np.arange(count * context + 1, dtype=np.uint32), context=context, seed=seed)


@settings(deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40))
def test_every_epoch_serves_every_line_once(count, seed, epoch):
    places = lines(count, seed=seed).place(np.arange(count) + epoch * count)
    np.testing.assert_array_equal(np.sort(places), np.arange(count))


@given(first=st.integers(0, 10_000), seed=st.integers(0, 9))
def test_a_place_depends_on_nothing_that_was_asked_before(first, seed):
    served = np.arange(first, first + 17)
    together = lines(101, seed=seed).place(served)
    np.testing.assert_array_equal(together, [lines(101, seed=seed).place(served[i : i + 1])[0] for i in range(17)])


def test_epochs_and_seeds_differ():
    orders = [tuple(lines(50, seed=seed).place(np.arange(50) + 50 * epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25


def test_each_line_is_as_likely_in_each_place():
    count, epochs = 5, 4000
    order = lines(count).place(np.arange(count * epochs)).reshape(epochs, count)
    for place in range(count):
        shares = np.bincount(order[:, place], minlength=count) / epochs
        assert np.abs(shares - 1 / count).max() < 0.03


def test_neighbours_in_the_text_are_not_neighbours_in_the_order():
    order = lines(10_000).place(np.arange(10_000))
    assert np.mean(np.abs(np.diff(order)) < 10) < 0.01
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_lines_overlap_by_one_token_and_cover_the_stream():
    packed = Lines(np.arange(41, dtype=np.uint16), context=13, seed=3)
    assert len(packed) == 3
    batch = packed.batch(0, 3)
    assert batch.dtype == np.int64
    assert sorted(batch.tolist()) == [list(range(start, start + 14)) for start in (0, 13, 26)]


def test_a_batch_may_span_epochs_and_goes_on_where_the_last_one_ended():
    packed = lines(11, context=7, seed=5)
    pieces = np.concatenate([packed.batch(0, 4), packed.batch(4, 9), packed.batch(13, 20)])
    np.testing.assert_array_equal(pieces, packed.batch(0, 33))


def test_the_order_is_the_same_on_every_machine():
    assert lines(7, seed=1).place(np.arange(7)).tolist() == [4, 5, 0, 1, 2, 6, 3]


def test_a_text_shorter_than_one_line_is_told_with_both_numbers():
    assert len(Lines(np.zeros(14, np.uint8), context=13)) == 1
    with pytest.raises(UserError, match=r"13 tokens, fewer than the 14 of one training line.*at most 12"):
        Lines(np.zeros(13, np.uint8), context=13)
    with pytest.raises(UserError, match="0 tokens"):
        Lines(np.zeros(0, np.uint8), context=13)
