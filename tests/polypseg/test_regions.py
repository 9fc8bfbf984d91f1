"""Even regions of a mask against every window looked at on its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from polypseg.data.regions import even_regions


def by_window(values: np.ndarray, wanted: np.ndarray, difference: int) -> np.ndarray:
    found = np.zeros_like(wanted)
    for row in range(len(wanted) - 4):
        for column in range(wanted.shape[1] - 4):
            window = np.s_[row : row + 5, column : column + 5]
            levels = values[window].reshape(25, -1).astype(int)
            even = (np.ptp(levels, axis=0) <= difference).all()
            found[window] |= bool(wanted[window].all() and even)
    return found


@given(st.data(), st.sampled_from([(), (3,)]), st.sampled_from([0, 8]))
@settings(deadline=None, derandomize=True)
def test_windows_agree(data: st.DataObject, channels: tuple[int, ...], difference: int) -> None:
    """Mostly one value, with spots that are a little or much unlike it, and spots not wanted."""
    levels = st.sampled_from([100, 108, 109])
    values = data.draw(arrays(np.uint8, (9, 12, *channels), elements=levels, fill=st.just(100)))
    wanted = data.draw(arrays(bool, (9, 12), elements=st.booleans(), fill=st.just(True)))
    expected = by_window(values, wanted, difference)
    np.testing.assert_array_equal(even_regions(values, wanted, difference), expected)


@pytest.mark.parametrize(("side", "found"), [(4, False), (5, True)])
def test_the_smallest_region_is_five_pixels_wide(side: int, found: bool) -> None:
    wanted = np.zeros((20, 20), bool)
    wanted[7 : 7 + side, 9:14] = True
    expected = wanted if found else np.zeros_like(wanted)
    np.testing.assert_array_equal(even_regions(wanted.astype(np.uint8), wanted), expected)
