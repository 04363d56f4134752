"""What was measured elsewhere, as data: nothing here is ours.

Table 4 and Fig. 7 of MoE-Lightning (ASPLOS 2025, arXiv 2411.11217). Batches that the paper does not
print come from its public artifact (github.com/caoshiyi/artifacts): FlexGen's from its scripts, and
MoE-Lightning's requests as time × throughput / generated tokens of its logs. Their micro-batch size
is the largest that its solver tries (…, 4, 36, 68, 100, …) and that divides a setup's batches.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from hrm.workload import WORKLOADS, Workload


class System(StrEnum):
    """The systems compared, in the order of their published throughput."""

    MOE_LIGHTNING = "MoE-Lightning"
    FLEXGEN = "FlexGen"
    FLEXGEN_C = "FlexGen(c)"
    DEEPSPEED = "DeepSpeed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRun:
    """One published throughput with the batch that it was measured on; weights are float16."""

    system: System
    setup: str
    model: str = "mixtral-8x7b"
    workload: Workload
    batch_size: int
    micro_batch_size: int
    tokens_per_s: float

    @property
    def seconds(self) -> float:
        """How long the run took, prefill and decode."""
        return self.batch_size * self.workload.gen_len / self.tokens_per_s

    @property
    def column(self) -> str:
        """The column of the paper's table that the run stands in: its workload and its setup."""
        return f"{self.workload.name} on {self.setup}"


SETUPS: Final = {
    "S1": "1×T4, Xeon 2.3 GHz, 24 cores, 192 GB",
    "S2": "1×L4, Xeon 2.2 GHz, 24 cores, 192 GB",
    "S6": "2×T4, Xeon 2.3 GHz, 32 cores, 416 GB",
    "S7": "4×T4, Xeon 2.3 GHz, 32 cores, 416 GB",
    "S8": "2×T4, Xeon 2.3 GHz, 32 cores, 416 GB",
    "S9": "4×T4, Xeon 2.3 GHz, 32 cores, 416 GB",
}


def padded(workload: Workload) -> Workload:
    """Every prompt padded to the longest: the paper's (p), and all that the baselines can do."""
    return replace(workload, prompt_len=workload.max_prompt_len)


_REASONING: Final = replace(padded(WORKLOADS["synthetic-reasoning"]), name="reasoning")
_SUMMARIZATION: Final = padded(WORKLOADS["summarization"])

# tokens/s, μ, N/μ of Table 4
_TABLE_4: Final = {
    System.MOE_LIGHTNING: ((26.349, 36, 26), (105.29, 100, 15), (4.52, 4, 19), (12.393, 8, 36)),
    System.FLEXGEN: ((22.691, 32, 61), (50.138, 64, 33), (3.868, 3, 92), (7.14, 8, 36)),
    System.FLEXGEN_C: ((16.903, 32, 61), (20.015, 64, 33), (2.614, 3, 92), (4.307, 8, 36)),
    System.DEEPSPEED: ((11.832, 102, 1), (18.589, 156, 1), (0.965, 8, 1), (1.447, 12, 1)),
}
_COLUMNS: Final = ((_REASONING, "S1"), (_REASONING, "S2"), (_SUMMARIZATION, "S1"), (_SUMMARIZATION, "S2"))

TABLE_4: Final = tuple(
    PublishedRun(
        system=system,
        setup=setup,
        workload=workload,
        batch_size=micro_batch_size * number,
        micro_batch_size=micro_batch_size,
        tokens_per_s=tokens_per_s,
    )
    for column, (workload, setup) in enumerate(_COLUMNS)
    for system, cells in _TABLE_4.items()
    for tokens_per_s, micro_batch_size, number in (cells[column],)
)

# Fig. 7, for 32, 64, 128 and 256 generated tokens: tokens/s, μ, N. DeepSpeed's batches are unknown.
GENERATED: Final = (32, 64, 128, 256)
_MTBENCH: Final = {
    ("S1", System.MOE_LIGHTNING): ((15.609, 36, 504), (23.997, 36, 504), (30.122, 36, 504), (33.938, 36, 504)),
    ("S1", System.FLEXGEN): ((12.1, 32, 1280), (12.3, 16, 1248), (9.5, 8, 1112), (9.6, 8, 904)),
    ("S1", System.FLEXGEN_C): ((9.8, 32, 1280), (9.4, 16, 1248), (7.2, 8, 1112), (6.8, 8, 904)),
    ("S2", System.MOE_LIGHTNING): ((53.714, 68, 1088), (67.369, 68, 1020), (78.972, 68, 884), (78.600, 68, 748)),
    ("S2", System.FLEXGEN): ((29.2, 64, 1344), (34.9, 64, 1280), (37.2, 64, 1152), (28.8, 32, 960)),
    ("S2", System.FLEXGEN_C): ((17.5, 64, 1344), (18.9, 64, 1280), (20.0, 64, 1152), (15.9, 32, 960)),
}
# Figs 7 and 8: Mixtral 8x22B padded (S6, S7), DBRX not padded (S8, S9). DBRX runs that aborted some
# of their requests count those that finished.
_SEVERAL_GPUS: Final = {
    "S6": ((5.3830, 36, 252), (7.3336, 36, 252), (7.7513, 36, 252), (9.1276, 36, 252)),
    "S7": ((14.883, 36, 648), (22.348, 36, 612), (26.228, 36, 540), (25.813, 36, 468)),
    "S8": ((34.037, 68, 2652), (36.235, 68, 2652), (29.672, 68, 2244), (25.865, 68, 1344)),
    "S9": ((71.543, 68, 4352), (83.582, 68, 3604), (82.981, 68, 2440), (59.455, 68, 1836)),
}


def _mtbench(generated: int, *, pad: bool) -> Workload:
    workload = replace(WORKLOADS["mtbench"], name=f"MTBench {generated}", gen_len=generated)
    return padded(workload) if pad else workload


MTBENCH: Final = tuple(
    PublishedRun(
        system=system,
        setup=setup,
        workload=_mtbench(generated, pad=True),
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        tokens_per_s=tokens_per_s,
    )
    for (setup, system), runs in _MTBENCH.items()
    for generated, (tokens_per_s, micro_batch_size, batch_size) in zip(GENERATED, runs, strict=True)
)
SEVERAL_GPUS: Final = tuple(
    PublishedRun(
        system=System.MOE_LIGHTNING,
        setup=setup,
        model="mixtral-8x22b" if setup in {"S6", "S7"} else "dbrx",
        workload=_mtbench(generated, pad=setup in {"S6", "S7"}),
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        tokens_per_s=tokens_per_s,
    )
    for setup, runs in _SEVERAL_GPUS.items()
    for generated, (tokens_per_s, micro_batch_size, batch_size) in zip(GENERATED, runs, strict=True)
)
