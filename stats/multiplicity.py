"""Correction of p-values for the number of tests."""

import numpy as np
from numpy.typing import NDArray


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's step-down correction: controls the chance of even one false alarm, whatever the dependence of the tests.

    With m tests in ascending order, p'(i) = max over j ≤ i of min(1, (m - j + 1) p(j)) (S. Holm, "A simple sequentially
    rejective multiple test procedure", Scand. J. Statist. 6, 1979).

    Args:
        p_values: any shape; NaN marks what was not tested and does not count.

    Returns:
        float64 of the same shape, NaN in the same places.
    """
    flat = np.asarray(p_values, dtype=np.float64).ravel()
    corrected = np.full(flat.shape, np.nan)
    tested = np.flatnonzero(np.isfinite(flat))
    order = tested[np.argsort(flat[tested], kind="stable")]
    steps = flat[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected.reshape(np.shape(p_values))
