"""How many of the host's threads compute or copy in each lane: runs use what was measured."""

from typing import Final, Literal

from hrm.tasks import Lane

STAGING_THREADS: Final = 4  # one copies 10 to 20 GB/s, and links take up to 60


def lane_threads(accelerator: Literal["cpu", "emulated", "cuda"], lane: Lane, cores: int) -> int:
    """Threads of `lane` on a host with so many cores to use, at least one."""
    match accelerator:
        case "cpu":  # lanes that compute take turns
            shares = {Lane.GPU: cores, Lane.CPU: cores}
        case "emulated":
            shares = {Lane.GPU: cores // 2, Lane.CPU: cores - cores // 2}
        case "cuda":  # the other lanes only queue what the device does
            queueing = min(3, cores // 4)
            shares = {Lane.CPU: cores - queueing, Lane.STAGE: min(STAGING_THREADS, cores // 4)}
    return max(1, shares.get(lane, 1))
