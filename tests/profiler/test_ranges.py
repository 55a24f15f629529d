"""Sets of numbers given as ranges, beside Python's own sets."""

import numpy as np
import pytest

from moescope.profiler.ranges import Ranges


@pytest.mark.parametrize(
    "items",
    [
        [],
        [0],
        [5, 3, 4],
        [range(3, 6), range(4, 5), 9, range(20, 30), 19, range(1)],
        [range(40), 7],
        [7, 7, range(7, 8), range(8, 12), range(10, 14), 30],
    ],
)
def test_they_are_what_a_set_of_them_is(items: list[int | range]) -> None:
    expected = {number for item in items for number in (item if isinstance(item, range) else [item])}
    found = Ranges.of(items)
    assert found.count == len(expected)
    assert (found.starts[1:] > found.stops[:-1]).all(), "neither overlap nor touch"
    values = np.arange(50, dtype=np.uint32)
    np.testing.assert_array_equal(found.hold(values), [value in expected for value in range(50)])
    for first in range(40):
        for last in range(first, 45):
            assert found.meet(first, last) == any(first <= number <= last for number in expected)


def test_a_range_of_any_length_takes_no_memory() -> None:
    found = Ranges.of([range(10, 2**62), 3])
    assert found.count == 2**62 - 9
    assert found.hold(np.array([3, 4, 10, 2**62 - 1, 2**62])).tolist() == [True, False, True, True, False]
