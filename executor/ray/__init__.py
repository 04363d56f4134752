"""Many machines: requests shared out by Ray over workers, each of which holds one engine.

`engine` is an engine as a class for `ray.data.Dataset.map_batches`, and `plans` says which of several policies it
runs, unless it makes its `own_plan`. `assignment` decides which requests a worker gets and what becomes of those that
it had when it died, `cluster` starts Ray and ends it, `worker` is the actor, `members` places them on nodes, `work`
feeds and replaces them, and `fleet` puts all together for `executor run --ray`. Only `cluster` imports ray, when it is
called.
"""

from executor.ray.engine import Engine

__all__ = ["Engine"]
