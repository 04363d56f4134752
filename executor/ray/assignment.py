"""Which requests a worker gets next, and what becomes of those that it had when it died."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, final

from executor.batching import Request

MOST_DEATHS: Final = 2  # of engines that had a request, the last of them alone
MOST_ASIDE: Final = 10_000  # requests that are kept for other workers, before one without room for them gets none


@dataclass(slots=True)
class Assigned:
    """Requests that one worker has; `left` are those that it has not answered, by name."""

    left: dict[str, Request]

    def done(self, name: str) -> bool:
        """Count a request as answered; False if it was before, or is not of this share."""
        return self.left.pop(name, None) is not None


@final
@dataclass(slots=True)
class Assignment:
    """Shares requests out, a request to one worker at a time.

    What a worker had not answered when it died is tried again in halves, so that the one that kills
    engines is soon alone; one that was there when two died, alone at the second, is given up.
    """

    requests: Iterator[Request]
    _again: deque[list[Request]] = field(default_factory=deque[list[Request]])
    _aside: deque[Request] = field(default_factory=deque[Request])
    _deaths: dict[str, int] = field(default_factory=dict[str, int])
    _is_exhausted: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left that no worker has, as far as was looked."""
        return self._is_exhausted and not self._again and not self._aside

    def next(self, most: int, has_room: Callable[[Request], bool] = lambda _: True) -> Assigned | None:
        """The next share, of so many requests at most that a worker has room for; None if there is none left."""
        chosen = self._lost_before(most, has_room) or self._fresh(most, has_room)
        return Assigned({request.name: request for request in chosen}) if chosen else None

    def _lost_before(self, most: int, has_room: Callable[[Request], bool]) -> list[Request]:
        """Requests of one share that was lost."""
        for index, part in enumerate(self._again):
            chosen = [request for request in part if has_room(request)][:most]
            if chosen:
                names = {request.name for request in chosen}
                rest = [request for request in part if request.name not in names]
                del self._again[index]
                self._again.extendleft([rest] if rest else [])
                return chosen
        return []

    def _fresh(self, most: int, has_room: Callable[[Request], bool]) -> list[Request]:
        """Requests that no worker had before."""
        chosen: list[Request] = []
        for _ in range(len(self._aside)):
            request = self._aside.popleft()
            take = len(chosen) < most and has_room(request)
            (chosen if take else self._aside).append(request)
        while len(chosen) < most and len(self._aside) < MOST_ASIDE:
            request = next(self.requests, None)
            if request is None:
                self._is_exhausted = True
                break
            (chosen if has_room(request) else self._aside).append(request)
        return chosen

    def lost(self, share: Assigned) -> Request | None:
        """Take back what a worker had when it died; the request that is given up, if one is."""
        left = list(share.left.values())
        for request in left:
            self._deaths[request.name] = self._deaths.get(request.name, 0) + 1
        if len(left) == 1 and self._deaths[left[0].name] >= MOST_DEATHS:
            return left[0]
        half = (len(left) + 1) // 2
        self._again.extend(part for part in (left[:half], left[half:]) if part)
        return None

    def rest(self) -> Iterator[Request]:
        """All that were not answered, when no worker is left that has room for them."""
        while (share := self.next(1)) is not None:
            yield from share.left.values()
