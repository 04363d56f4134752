"""The file that a solved policy is kept in: the policy, and all that it was solved for.

It embeds the machine and the model's dimensions, so a run and its validation need nothing else.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hrm.decoding import read_json
from hrm.errors import HrmError, PolicyError, ProfileError
from hrm.estimate import Estimate, slowest_share
from hrm.files import write_whole
from hrm.hardware import CPU, GPU, HardwareProfile
from hrm.model_spec import ModelSpec
from hrm.parallel import Part, Share, part_for, shares_for, used_of
from hrm.policy import Policy
from hrm.strict import decode_strictly
from hrm.workload import Workload

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFile:
    """A policy with its memory budgets, what it was solved for and what was predicted.

    `memory_budget_bytes` maps each level to what the policy may use there.
    """

    schema: int = SCHEMA
    policy: Policy
    memory_budget_bytes: dict[str, int]
    model: ModelSpec
    workload: Workload
    profile: HardwareProfile
    profile_hash: str
    predicted: dict[str, float]

    @property
    def num_gpus(self) -> int:
        """How many GPUs of the machine the policy uses."""
        return used_of(self.profile, self.policy).num_gpus

    @property
    def part(self) -> Part:
        """What the policy is for: model and machine, or one pipeline stage of both.

        Raises PolicyError if the policy was made for another part.
        """
        return part_for(self.policy, self.model, self.profile)

    @property
    def share(self) -> Share:
        """What is shown of the policy: all of it with its part, or of stages that are planned one by one the slowest.

        Raises PolicyError if the policy was made for another part.
        """
        return slowest_share(self.policy, self.model, self.profile, self.workload)


def profile_hash(profile: HardwareProfile) -> str:
    """A short hash of everything in the profile."""
    return hashlib.sha256(msgspec.json.encode(profile, order="sorted")).hexdigest()[:16]


def policy_file_of(predicted: Estimate, spec: ModelSpec, profile: HardwareProfile, workload: Workload) -> PolicyFile:
    """The file's content for an estimated policy; its budgets are the levels' usable bytes."""
    return PolicyFile(
        policy=predicted.policy,
        memory_budget_bytes={GPU: profile.top.usable_bytes, CPU: profile.host.usable_bytes},
        model=spec,
        workload=workload,
        profile=profile,
        profile_hash=profile_hash(profile),
        predicted={
            "tokens_per_s": predicted.tokens_per_s,
            "bound_tokens_per_s": predicted.bound_tokens_per_s,
            "prefill_s": predicted.prefill.seconds,
            "decode_s": predicted.decode.seconds,
        },
    )


def save_policy_file(path: Path, content: PolicyFile) -> None:
    """Write the file, whole or not at all; PolicyError if it cannot be, see `write_whole`."""
    text = msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
    write_whole(path, text, PolicyError, remedy="choose another --out")


def load_policy_file(path: Path) -> PolicyFile:
    """Read and check a policy file; PolicyError naming the file and the field."""
    plain = read_json(
        path,
        "a policy file: one JSON object",
        PolicyError,
        remedy="write it again with hrm search --out or hrm estimate --out",
    )
    try:
        content = decode_strictly(
            plain, PolicyFile, str(path), remedy="correct it, or write the file again with hrm search --out"
        )
    except ProfileError as error:
        raise PolicyError(error.where, error.value, error.rule, error.remedy) from error
    check_policy_file(content, str(path))
    return content


def check_policy_file(content: PolicyFile, where: str) -> None:
    """Raise PolicyError, which names `where` it was read, unless all of it goes together."""
    if content.schema != SCHEMA:
        raise PolicyError(f"{where}: schema", content.schema, f"must be {SCHEMA}", "write it again with hrm search")
    for level in (GPU, CPU):
        budget = content.memory_budget_bytes.get(level)
        if budget is None or budget < 1:
            raise PolicyError(
                f"{where}: memory_budget_bytes.{level}",
                "<missing>" if budget is None else budget,
                "must be a positive number of bytes",
                "write it again with hrm search --out",
            )
    try:
        shares_for(content.policy, content.model, content.profile)
    except HrmError as error:
        raise PolicyError(f"{where}: {error.where}", error.value, error.rule, error.remedy) from error
