"""How long `hrm search` takes over all built-in models, and how many policies it evaluates."""

import statistics
import time

import pytest

from hrm.machines import compose
from hrm.model_spec import BUILT_IN_MODELS
from hrm.policy import ScheduleName
from hrm.search.exhaustive import grids
from hrm.search.space import Space
from hrm.workload import WORKLOADS
from tests.bench.machine import circumstances
from tests.bench.test_startup import seconds_of, whole_command

MACHINES = ("1xT4", "4xT4", "4xL4", "8xH200")
SLOWEST, RUNS = 5, 7
# The longest of all models on 1, 2, 4 and 8 of every GPU: several ways are nearly as good, or there are many chunks.
SLOW = (
    "--model gemma-4-26b-a4b --gpus 8xB200",
    "--model qwen3-next --gpus 2xH100",
    "--model qwen3-235b-a22b --gpus 8xB200",
    "--model gemma-4-26b-a4b --gpus 8xA16",
    "--model dbrx --gpus 8xH100",
    "--model qwen3.5-35b-a3b --gpus 2xA30",
    "--model deepseek-v2-lite --gpus 2xA16",
    "--model gemma-4-26b-a4b --gpus 8xH200",
    "--model glm-4.7-flash --gpus 2xA16",
    "--model qwen3-next --gpus 4xA100-40G",
    "--model qwen3.5-35b-a3b --gpus 2xV100-16G",
)


def test_whole_searches():
    """Every model on every machine once, fit or not; the slowest of them again for a median."""
    commands = [f"hrm search --model {model} --gpus {gpus}" for model in BUILT_IN_MODELS for gpus in MACHINES]
    once = {command: seconds_of(whole_command(command), check=False) for command in commands}
    middle = statistics.median(once.values())
    print(f"\n{circumstances()}\n{len(commands)} whole searches, median {middle:.2f} s; slowest:")
    for command in sorted(commands, key=once.__getitem__, reverse=True)[:SLOWEST]:
        print_median(command)


def test_slow_searches():
    """Those of all models and machines that are known to take long."""
    print(f"\n{circumstances()}")
    for options in SLOW:
        print_median(f"hrm search {options}")


def print_median(command: str) -> None:
    """How long a command takes, several times over."""
    seconds = sorted(seconds_of(whole_command(command), check=False) for _ in range(RUNS))
    print(f"  {command}: median {statistics.median(seconds):.2f} s of {RUNS} ({seconds[0]:.2f} to {seconds[-1]:.2f})")


@pytest.mark.parametrize(("model", "gpus"), [("mixtral-8x7b", "1xT4"), ("dbrx", "4xT4")])
def test_policies_a_second(model, gpus):
    """In the search itself: memory at both levels, then closed-form seconds of what fits."""
    space = Space(
        spec=BUILT_IN_MODELS[model],
        profile=compose(gpus),
        workload=WORKLOADS["mtbench"],
        dtype="float16",
        schedule=ScheduleName.CGOPIPE,
    )
    rates: list[float] = []
    for _ in range(RUNS):
        start_s = time.perf_counter()
        kinds = grids(space)
        for kind in kinds:
            while kind.solve() is None:
                pass
        rates.append(sum(kind.evaluations for kind in kinds) / (time.perf_counter() - start_s))
    print(
        f"\n{model} on {gpus}: {statistics.median(rates):,.0f} policies a second, median of {RUNS} "
        f"({min(rates):,.0f} to {max(rates):,.0f})"
    )
