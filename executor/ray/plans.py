"""Which of several policies a machine runs: one that was solved for what is there, and is predicted to be fastest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from executor.job.machine import AcceleratorOptions, accelerator_for
from hrm.errors import PolicyError
from hrm.files import is_folder
from hrm.policy import Policy
from hrm.policy_file import PolicyFile, load_policy_file
from hrm.profiling.environment import host_facts
from hrm.units import counted, format_number

FILES: Final = "*.json"  # of a folder of policies


@dataclass(frozen=True, slots=True)
class Plan:
    """A policy file and where it was read."""

    path: str
    file: PolicyFile

    @property
    def tokens_per_s(self) -> float:
        """What was predicted for the machine that it was solved for; 0 if the file does not say."""
        return self.file.predicted.get("tokens_per_s", 0.0)

    def text(self, policy: Policy) -> str:
        """The plan in a line, where this policy of it is run."""
        ranks = self.file.num_gpus
        group = f", {counted(ranks, 'rank')}" if ranks > 1 else ""
        rate = f", predicted {format_number(self.tokens_per_s)} tokens/s" if self.tokens_per_s else ""
        return (
            f"{Path(self.path).name} (for {self.file.profile.name}): {policy.schedule.value}, batches of"
            f" {policy.batch_size} in micro-batches of {policy.micro_batch_size}"
            f"{group}{rate}"
        )


def read_plans(paths: Sequence[Path]) -> tuple[Plan, ...]:
    """The policies of these files, and of all files in those that are folders.

    Raises PolicyError if one cannot be read, a folder holds none, or not all give the same answers.
    """
    plans = tuple(Plan(str(file), load_policy_file(file)) for path in paths for file in _files(path))
    for first, plan in pairwise(plans):
        same_name = replace(plan.file.model, name=first.file.model.name)
        for field, ours, others in (
            ("model", same_name, first.file.model),
            ("policy.dtype", plan.file.policy.dtype, first.file.policy.dtype),
            ("policy.kv_format", plan.file.policy.kv_format, first.file.policy.kv_format),
        ):
            if ours != others:
                value, wanted = (f"<{plan.file.model.name}>", "") if field == "model" else (ours, f" {others!r}")
                rule = f"must be as in {first.path}{wanted}: all workers give the same answers"
                raise PolicyError(f"{plan.path}: {field}", value, rule, "solve them alike, or leave one of them out")
    return plans


def _files(path: Path) -> list[Path]:
    if not is_folder(path):
        return [path]
    found = sorted(path.glob(FILES))
    if not found:
        rule = f"must be a policy file, or a folder that holds some ({FILES})"
        raise PolicyError("--policy", str(path), rule, "write them with hrm search --out")
    return found


def by_preference(plans: Sequence[Plan], accelerator: AcceleratorOptions) -> list[Plan]:
    """The policies, that which is best on this machine first.

    Those solved for a GPU that it has come before all others, then those for a host like it, and of these the one that
    was predicted to be fastest.
    """
    if len(plans) == 1:
        return list(plans)
    host = host_facts().describe()

    def preference(plan: Plan) -> tuple[bool, bool, float]:
        profile = plan.file.profile
        is_gpu_here = accelerator_for(accelerator.name, profile).startswith("cuda")
        is_host_here = all(profile.environment.get(key) == host[key] for key in ("cpu", "usable_cores"))
        return is_gpu_here, is_host_here, plan.tokens_per_s

    return sorted(plans, key=preference, reverse=True)
