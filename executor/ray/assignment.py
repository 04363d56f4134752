"""Which requests a worker gets next, and what becomes of those that it had when it died."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, final

from executor.batching import Request

MOST_DEATHS: Final = 2  # of engines that had a request, the last of them alone


@dataclass(slots=True)
class Share:
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
    _deaths: dict[str, int] = field(default_factory=dict[str, int])

    def next(self, most: int) -> Share | None:
        """The next share, of so many requests at most; None if there is none left."""
        chosen: list[Request] = []
        if self._again:
            chosen = self._again.popleft()
            if len(chosen) > most:
                self._again.appendleft(chosen[most:])
                chosen = chosen[:most]
        else:
            for request in self.requests:
                chosen.append(request)
                if len(chosen) == most:
                    break
        return Share({request.name: request for request in chosen}) if chosen else None

    def lost(self, share: Share) -> Request | None:
        """Take back what a worker had when it died; the request that is given up, if one is."""
        left = list(share.left.values())
        for request in left:
            self._deaths[request.name] = self._deaths.get(request.name, 0) + 1
        if len(left) == 1 and self._deaths[left[0].name] >= MOST_DEATHS:
            return left[0]
        half = (len(left) + 1) // 2
        self._again.extend(part for part in (left[:half], left[half:]) if part)
        return None
