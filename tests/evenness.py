"""Are kinds drawn equally often? A test that knows, and holds, how small a fault it would find."""
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, ncx2

FALSE_ALARMS = 0.001   # of even draws are called uneven
POWER = 0.99           # of uneven ones are found


def assert_even(counts: Sequence[int] | NDArray[np.integer], *, draws: int, off: float) -> None:
    """Assert that `draws` independent draws, each of as many different kinds, chose every kind equally often.

    The statistic is chi-square for draws without replacement (of one kind each: the usual one). One kind that comes up
    more or less often than it should by the share `off` of its frequency would be found with probability POWER: that is
    asserted too, so a test that draws too little to say what it says fails.

    Args:
        counts: (kinds,) how often each came up.
        draws: how many there were.
        off: share.
    """
    found = np.asarray(counts, np.float64)
    freedom, share = len(found) - 1, found.sum() / draws / len(found)
    limit = chi2.isf(FALSE_ALARMS, freedom)
    assert ncx2.sf(limit, freedom, draws * share * off ** 2 / (1 - share)) >= POWER, "too few draws to find that"
    statistic = ((found - draws * share) ** 2).sum() / (draws * share * (1 - share)) * freedom / len(found)
    assert statistic < limit
