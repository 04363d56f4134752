"""What to tell whose input asks for more than the policy was solved for."""

import shlex

from executor.job.input_file import path_of
from executor.job.options import JobOptions
from executor.job.survey import RequestLengths, Survey
from hrm.machines import save_profile
from hrm.policy import Policy
from hrm.policy_file import PolicyFile
from hrm.workload import Workload

MACHINE_YAML = "machine.yaml"
_FULLER = 1.1  # than the cache of a whole batch: less than that is not worth a word


def advice(found: Survey, policy_file: PolicyFile, options: JobOptions) -> str | None:
    """A line with the search that solves a policy for this input; None if this one is for it.

    The machine that the policy was solved for is written into the output directory, for that search;
    ProfileError if that fails.
    """
    asked, solved = found.asked, policy_file.workload
    if not found.more and not too_long_together(asked, policy_file.policy):
        return None
    machine, wanted = options.output_dir / MACHINE_YAML, asked.workload()
    save_profile(machine, policy_file.profile)
    gpu_memory_bytes, mean_new = options.accelerator.gpu_memory_bytes, wanted.mean_gen_len
    given = {
        "--model": options.told_model,
        "--profile": str(machine),
        "--dtype": policy_file.policy.dtype,
        "--gpu-memory": None if gpu_memory_bytes is None else f"{gpu_memory_bytes}B",
        "--prompt-len": f"{wanted.prompt_len:.1f}",
        "--max-prompt-len": str(wanted.max_prompt_len),
        "--gen-len": str(wanted.gen_len),
        "--mean-gen-len": None if mean_new is None else f"{mean_new:.1f}",
        "--requests": str(asked.requests),
        "--out": str(options.policy.with_name(f"{options.policy.stem}-for-{path_of(options.input).stem}.json")),
    }
    command = ["hrm", "search", *(word for flag, value in given.items() if value is not None for word in (flag, value))]
    return (
        f"the input asks for more than the policy was solved for ({_told(wanted)}, against "
        f"{_told(solved)}): fewer requests run at once, and those that do not fit at all are "
        f"refused; solve one for it: {shlex.join(command)}"
    )


def too_long_together(asked: RequestLengths, policy: Policy) -> bool:
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
