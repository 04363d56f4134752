"""What the stages are told: the suite's setting, and what a first run has besides."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from hrm.model_spec import ModelSpec
from hrm.units import GB
from tests.bench.suite.setting import Scale, Setting

CAP: Final = "24GB"
LEAVE_GPU_BYTES: Final = 1.5 * GB  # of a card that has no more than the cap: its context, and other processes
POLICY: Final = "policy.json"
TRACE: Final = "trace.json.gz"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSetting:
    """The suite's setting; `host_memory_bytes` caps what is touched and planned of the host's memory."""

    suite: Setting
    host_memory_bytes: int | None = None

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.suite.results

    @property
    def device_index(self) -> int:
        """The card's."""
        return int(self.suite.accelerator.partition(":")[2] or 0)

    @property
    def few_layers(self) -> ModelSpec:
        """The model of few layers that orders and other engines are compared on."""
        spec = self.suite.scale.spec
        return spec.with_layers(spec.layers[: self.suite.scale.few_layers])

    def planned_with(self, host_bytes: int, free_gpu_bytes: int | None) -> Setting:
        """The suite's setting with no more memory than was found to be there."""
        scale = self.suite.scale
        caps = dict(scale.gpu_memory_bytes)
        if free_gpu_bytes is not None:
            caps[CAP] = min(caps[CAP], int(free_gpu_bytes - LEAVE_GPU_BYTES))
        most = min(host_bytes, scale.host_memory_bytes or host_bytes)
        held: Scale = replace(scale, gpu_memory_bytes=caps, host_memory_bytes=most)
        return replace(self.suite, scale=held)
