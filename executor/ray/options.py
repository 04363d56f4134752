"""What `executor run --ray` is told of the fleet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LOCAL: Final = "local"
LOCAL_WORKERS: Final = 2  # that are started on this machine, if it is not said how many


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """Where the workers are, and how many: by default 2 on this machine, or one on every node.

    `policies` are files and folders of them; each worker runs the one that is best on its node. With `own_plans`
    every node measures itself and solves for itself what the first was solved for.
    """

    address: str = LOCAL
    workers: int | None = None
    model: str = ""  # its name on the Hub, revision included: each node fetches it; else the folder is
    policies: Sequence[Path] = ()
    own_plans: bool = False

    def count(self, nodes: int) -> int:
        """How many workers there are to be on so many nodes."""
        return self.workers or (LOCAL_WORKERS if self.address == LOCAL else nodes)
