"""What a job is told, and who may run its requests."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from executor.batching import Request
from executor.job.input_file import Input
from executor.job.machine import AcceleratorOptions
from executor.job.progress import JobProgress
from executor.job.report import Ending
from executor.job.sampling_defaults import SamplingSource
from executor.job.writer import OutputWriter
from hrm.policy import ScheduleName
from hrm.run_record import FleetRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What `executor run` is told; `model_name` is how the model is called, if not by its folder.

    `gpus` must be as many as the policy was solved for, and need not be said.
    """

    model: Path
    model_name: str = ""
    policy: Path
    input: Input
    output_dir: Path
    accelerator: AcceleratorOptions = field(default_factory=AcceleratorOptions)
    gpus: int | None = None
    schedule: ScheduleName | None = None
    seed: int = 0
    sampling_defaults: SamplingSource = "model"
    max_requests: int | None = None
    resume: bool = False

    @property
    def told_model(self) -> str:
        """The model as its user names it."""
        return self.model_name or str(self.model)


class Elsewhere(Protocol):
    """What runs a job's requests in other processes."""

    def answer(self, requests: Iterator[Request], writer: OutputWriter, progress: JobProgress) -> None:
        """Run all requests, and put what ends."""
        ...

    def record(self, ending: Ending) -> FleetRecord:
        """What run.json then holds."""
        ...
