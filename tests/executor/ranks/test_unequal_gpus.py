"""A policy for GPUs that are not alike is refused before anything large is touched."""

import pytest

from executor.job.machine import check_whole
from hrm.errors import PolicyError
from hrm.estimate import estimate
from hrm.machines import compose
from hrm.model_spec import BUILT_IN_MODELS
from hrm.policy import Parallelism, Policy
from hrm.policy_file import policy_file_of
from hrm.workload import WORKLOADS


@pytest.mark.parametrize(
    "changes",
    [{}, {"parallelism": Parallelism.PIPELINE, "stage_lengths": (20, 12)}, {"gpus": (0,)}],
    ids=["ranks", "stages", "one alone"],
)
def test_a_policy_for_unequal_gpus_is_refused(changes):
    spec, profile, workload = BUILT_IN_MODELS["mixtral-8x7b"], compose("1xRTX-4090+1xRTX-3090"), WORKLOADS["mtbench"]
    policy = Policy(
        batch_size=8,
        micro_batch_size=4,
        resident_experts=(0,) * spec.num_layers,
        kv_tokens_per_micro_batch=4096,
        prefill_chunk_tokens=512,
        **changes,
    )
    content = policy_file_of(estimate(spec, policy, profile, workload), spec, profile, workload)
    with pytest.raises(
        PolicyError, match=r"policy.json: profile.gpus is .*not alike.*run hrm search for the GPUs of one"
    ):
        check_whole(content, "policy.json")
