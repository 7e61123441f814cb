"""A question about the values of data that do not look as networks expect them."""

from stablefield.pool import Pool

_SAMPLE = 512  # data points that are looked at
_DEFAULT = 0.5  # sigma_data, the standard deviation that networks and noise levels are made for


def range_question(pool: Pool, sigma_data: float | None = None) -> str | None:
    """One line about values that may be on another scale than the user thinks; None if there is nothing to ask.

    Questioned are constant data, bytes that use less than an eighth of their levels, floats in [0, 1], and a standard
    deviation that is more than three times larger or smaller than `sigma_data`. Evenly spaced data points are looked
    at, as many as it takes to see this.

    Args:
        pool: the data.
        sigma_data: standard deviation of the data that the configuration assumes; by default 0.5.
    """
    stored = pool.stored(pool.evenly_spaced(_SAMPLE))
    values = pool.decode(stored).double()
    low, high = stored.min().item(), stored.max().item()
    std = float(values.std(correction=0)) if values.numel() > 1 else 0.0
    found = f"range of values {low:.4g} to {high:.4g}, standard deviation {std:.3g}"
    if low == high:
        return f"{found}: all values are equal; are these the right data?" if values.numel() > 1 else None
    if not stored.is_floating_point() and pool.num_levels > 8 and high < pool.num_levels // 8:
        return (
            f"{found}: bytes use few of their {pool.num_levels} levels, of which 0 stands for -1 and "
            f"{pool.num_levels - 1} for 1; multiply them, or store num_levels={high + 1} beside them in an .npz file"
        )
    sigma = _DEFAULT if sigma_data is None else sigma_data
    expected = f"but {'about 0.5 is expected' if sigma_data is None else f'sigma_data is {sigma_data:g}'}"
    advice = f"rescale them, or set preconditioning.sigma_data={std:.2g} if they are meant to be so"
    if stored.is_floating_point() and low >= 0 and high <= 1 and abs(sigma - _DEFAULT) < 0.05:
        return f"{found}, {expected}: images in [0, 1]? Those of [-1, 1] are expected; {advice}"
    if not sigma / 3 <= std <= 3 * sigma:
        return f"{found}, {expected}; {advice}"
    return None
