"""What a run of the suite is told, and the two sizes it comes in."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hrm.model_spec import Dimensions, ModelSpec, load_model
from hrm.units import GB, MB
from hrm.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large everything is.

    `gpu_memory_bytes` are the caps on GPU memory by the name that the steps carry, and
    `host_memory_bytes` a cap on the host's. Schedules are compared on `few_layers` of the model, and orders
    under CGOPipe's policy over `few_tokens` new tokens a request. transformers is tried with batches
    from `first_batch` to `last_batch`, and measured over `offload_steps` decode steps.
    """

    name: str
    spec: ModelSpec
    workload: Workload
    gpu_memory_bytes: dict[str, int]
    host_memory_bytes: int | None = None
    few_layers: int
    few_tokens: int
    profile_s: float
    first_batch: int
    last_batch: int
    offload_steps: int


FULL: Final = Scale(
    name="full",
    spec=load_model("mixtral-8x7b"),
    # The lengths of MTBench, and the fewest new tokens that MoE-Lightning reports (§5.1).
    workload=Workload(name="mtbench", prompt_len=77, max_prompt_len=418, gen_len=32),
    gpu_memory_bytes={"16GB": 16 * GB, "24GB": 24 * GB},
    few_layers=8,
    few_tokens=8,
    profile_s=75.0,
    first_batch=128,
    last_batch=4096,
    offload_steps=4,
)
SMALL: Final = Scale(
    name="small",
    spec=Dimensions(
        name="mixtral-small",
        family="mixtral",
        num_layers=3,
        num_experts=8,
        experts_per_token=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=256,
    ).spec,
    workload=Workload(name="mtbench-small", prompt_len=6, max_prompt_len=12, gen_len=4),
    gpu_memory_bytes={"16GB": MB, "24GB": 3 * MB // 2},
    host_memory_bytes=8 * MB,
    few_layers=2,
    few_tokens=3,
    profile_s=1.5,
    first_batch=2,
    last_batch=4,
    offload_steps=2,
)
CAPS: Final = tuple(FULL.gpu_memory_bytes)
SCALES: Final = {scale.name: scale for scale in (FULL, SMALL)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the steps are run on, where their results go, and until when on `time.monotonic`."""

    accelerator: str
    scale: Scale
    results: Path
    resume: bool = False
    link_bytes_per_s: float | None = None
    command: str = ""
    until_s: float = field(default=float("inf"))

    @property
    def emulated(self) -> bool:
        """Whether no figure is of a real accelerator."""
        return not self.accelerator.startswith("cuda")

    @property
    def profile_path(self) -> Path:
        """Where the hardware profile lies."""
        return self.results / "machine.yaml"

    def left_s(self) -> float:
        """Seconds until the step has to end."""
        return self.until_s - time.monotonic()
