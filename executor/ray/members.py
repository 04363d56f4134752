"""The workers of a fleet, one by one: on which node each is placed, what it has to do, and what it did."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final, final

from executor.backends import may_have_gpu
from executor.ray.assignment import Assigned
from executor.ray.plans import Plan
from executor.ray.worker import Ready, Worker
from hrm.run_record import RunRecord, WorkerRecord

DIED: Final = "died"


@final
@dataclass(slots=True, eq=False)
class Member:
    """A worker, the node that it was placed on, what it told when it was ready, and the requests that it has.

    The counts are of the answers that arrived, and `run` is what it last told of itself. One that has died or cannot
    run the job is not `alive`.
    """

    number: int
    actor: Any
    node_id: str
    alive: bool = True
    ready: Ready | None = None
    share: Assigned | None = None
    requests: int = 0
    generated_tokens: int = 0
    run: RunRecord | None = None

    @property
    def name(self) -> str:
        """What it is called to the user."""
        return f"worker {self.number}{f' on {self.ready.node}' if self.ready else ''}"

    def record(self, ready: Ready) -> WorkerRecord:
        """What run.json holds of it."""
        return WorkerRecord(
            worker=self.number,
            node=ready.node,
            policy=ready.policy,
            outcome="completed" if self.alive else DIED,
            requests=self.requests,
            generated_tokens=self.generated_tokens,
            run=self.run,
        )


@final
@dataclass(slots=True)
class Members:
    """Starts `count` workers, spread evenly over the nodes that are alive; each takes its part of a node.

    That is its part of the node's cores, and of its GPUs as many as some plan uses. `engine` is what a worker's engine
    is made of.
    """

    ray: ModuleType
    count: int
    plans: Sequence[Plan]
    accelerator: str
    engine: dict[str, Any]
    all: list[Member] = field(default_factory=list[Member])

    def start(self) -> Member:
        """Start one more, on the node that has the fewest."""
        nodes = {node["NodeID"]: node["Resources"] for node in self.ray.nodes() if node["Alive"]}
        taken = Counter(member.node_id for member in self.all if member.alive)
        node_id = min(nodes, key=lambda one: taken[one])
        on_each = -(-self.count // len(nodes))
        cpus, gpus = (int(nodes[node_id].get(kind, 0)) // on_each for kind in ("CPU", "GPU"))
        most_gpus = max(plan.file.num_gpus for plan in self.plans)
        has_gpu = bool(nodes[node_id].get("GPU")) and may_have_gpu(self.accelerator)
        actor_class = self.ray.remote(
            num_cpus=max(cpus, 1),  # Ray gives the actor's threads so many
            num_gpus=min(max(gpus, 1), most_gpus) if has_gpu else 0,
            max_restarts=0,
            max_concurrency=2,
            scheduling_strategy=self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=True),
        )(Worker)
        member = Member(len(self.all) + 1, actor_class.remote(**self.engine, engines=on_each), node_id)
        self.all.append(member)
        return member
