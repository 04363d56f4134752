"""What to tell whose input asks for more than the policy was solved for."""

import shlex
from pathlib import Path

from executor.job.input_file import Input, path_of
from executor.job.survey import Lengths, Survey
from hrm.machines import save_profile
from hrm.policy import Policy
from hrm.policy_file import PolicyFile
from hrm.workload import Workload

MACHINE_YAML = "machine.yaml"
_FULLER = 1.1  # than the cache of a whole batch: less than that is not worth a word


def advice(
    found: Survey,
    policy_file: PolicyFile,
    *,
    model: str,
    policy: Path,
    input_: Input,
    directory: Path,
    gpu_memory_bytes: int | None,
) -> str | None:
    """A line with the search that solves a policy for this input; None if this one is for it.

    The machine that the policy was solved for is written into the directory, for that search;
    ProfileError if that fails.
    """
    asked, solved = found.asked, policy_file.workload
    if not found.more and not too_long_together(asked, policy_file.policy):
        return None
    machine = directory / MACHINE_YAML
    save_profile(machine, policy_file.profile)
    wanted = asked.workload()
    mean_new = wanted.mean_gen_len
    command = [
        "hrm",
        "search",
        "--model",
        model,
        "--profile",
        str(machine),
        "--dtype",
        policy_file.policy.dtype,
        *(["--gpu-memory", f"{gpu_memory_bytes}B"] if gpu_memory_bytes is not None else []),
        "--prompt-len",
        f"{wanted.prompt_len:.1f}",
        "--max-prompt-len",
        str(wanted.max_prompt_len),
        "--gen-len",
        str(wanted.gen_len),
        *(["--mean-gen-len", f"{mean_new:.1f}"] if mean_new is not None else []),
        "--requests",
        str(asked.requests),
        "--out",
        str(policy.with_name(f"{policy.stem}-for-{path_of(input_).stem}.json")),
    ]
    return (
        f"the input asks for more than the policy was solved for ({_told(wanted)}, against "
        f"{_told(solved)}): fewer requests run at once, and those that do not fit at all are "
        f"refused; solve one for it: {shlex.join(command)}"
    )


def too_long_together(asked: Lengths, policy: Policy) -> bool:
    """Whether the cache is too small for a whole batch, or all that is asked, on average."""
    if not asked.requests:
        return False
    at_once = min(asked.requests, policy.batch_size)
    tokens = (asked.prompt_tokens + asked.new_tokens) / asked.requests * at_once
    return tokens > _FULLER * policy.kv_tokens_per_micro_batch * policy.num_micro_batches


def _told(workload: Workload) -> str:
    return (
        f"prompts of up to {workload.max_prompt_len} tokens and {workload.prompt_len:.1f} on "
        f"average, {workload.gen_len} generated"
    )
