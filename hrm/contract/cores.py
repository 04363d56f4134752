"""Which cores of a host each of several processes has: runs keep to what is planned of the host's rates."""

from collections.abc import Sequence


def cores_in_proportion(shares: Sequence[float], cores: int) -> tuple[range, ...]:
    """Which of so many cores each part has that gets such a share of what the host computes, in their order.

    Ends are rounded to whole cores. Every part has one at least, which it shares with another where there are too few.
    """
    whole, end, found = sum(shares), 0.0, list[range]()
    for share in shares:
        first, end = round(end / whole * cores), end + share
        last = round(end / whole * cores)
        found.append(range(first, last) if last > first else range(min(first, cores - 1), min(first, cores - 1) + 1))
    return tuple(found)
