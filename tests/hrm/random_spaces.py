"""Random spaces that solvers are held to one another in; it imports little, for processes that share a study."""

from functools import cache
from random import Random

from hrm.formats import FORMATS
from hrm.policy import ScheduleName
from hrm.search import Space
from hrm.units import MB
from hrm.workload import Workload
from tests.hrm.support import machine, random_spec, random_varied_spec


@cache
def a_space(seed: int) -> Space:
    """A random model, machine and workload, with sizes small enough to be searched whole."""
    rng = Random(seed)
    spec = random_spec(rng) if seed % 2 else random_varied_spec(rng)
    weights = spec.total_layer_bytes(FORMATS["bfloat16"])
    profile = machine(
        gpu_bytes=weights * rng.uniform(0.3, 1.3) + rng.uniform(0.2, 4) * MB,
        cpu_bytes=weights * rng.uniform(0.9, 2) + rng.uniform(1, 20) * MB,
        gpu_flops=10 ** rng.uniform(9, 12),
        cpu_flops=10 ** rng.uniform(8, 11),
        gpu_read=10 ** rng.uniform(9, 11.5),
        cpu_read=10 ** rng.uniform(8, 10.5),
        link=10 ** rng.uniform(6.5, 9.5),
        latency_s=rng.choice([0.0, 1e-5]),
        launch_s=rng.choice([0.0, 1e-6]),
    )
    prompt_len = rng.randint(4, 60)
    workload = Workload(
        name="random",
        prompt_len=prompt_len,
        max_prompt_len=prompt_len + rng.choice([0, 0, 30]),
        gen_len=rng.choice([2, 9, 40]),
        num_requests=rng.choice([None, rng.randint(3, 40)]),
    )
    return Space(
        spec=spec,
        profile=profile,
        workload=workload,
        dtype="bfloat16",
        schedule=rng.choice([ScheduleName.CGOPIPE, ScheduleName.CGOPIPE, *ScheduleName]),
        staging=rng.random() < 0.2,
        max_micro_batch_size=rng.randint(2, 10),
        max_micro_batches=rng.randint(1, 6),
    )
