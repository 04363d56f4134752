"""Many machines: requests shared out by Ray over workers, each of which holds one engine.

`engine` is an engine as a class for `ray.data.Dataset.map_batches`, `assignment` decides which requests
a worker gets and what becomes of those that it had when it died, `cluster` starts Ray and ends it,
`worker` is the actor, and `fleet` puts them together for `executor run --ray`. Only `cluster` and
`fleet` import ray, when they are called.
"""

from executor.ray.engine import Engine

__all__ = ["Engine"]
