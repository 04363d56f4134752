"""The executor on the CPU, under the policy that the search finds for each row on a profile of this machine."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from executor.backends import in_thread_of_its_own
from executor.batching import Completion, Request
from executor.bench import Bench, BenchOptions
from executor.job.machine import AcceleratorOptions
from executor.model.host_kernels import host_kernels
from executor.sampling import SamplingParams
from hrm.machines import save_profile
from hrm.model_spec import load_model
from hrm.profiling.machine import ProfileOptions, profile_machine
from tests.bench.peers.drivers.turn import Engine, Job, Tokens, take_turn


class Answers:
    """A sink that keeps what each request was answered."""

    def __init__(self) -> None:
        self.tokens = dict[str, list[int]]()

    def put(self, completion: Completion) -> None:
        self.tokens[completion.request.name] = list(completion.tokens)

    def stops(self) -> bool:
        return False


class Ours(Engine):
    """Policies differ from row to row, and with them the memory: weights are loaded anew for each, unclocked."""

    packages = ("moe-hrm", "torch")

    def __init__(self, job: Job) -> None:
        self._job, self._stack = job, ExitStack()
        profile = Path(job.profile)
        if not profile.is_file():
            options = ProfileOptions(
                "cpu",
                quick=True,
                budget_s=3.0 if job.small else None,
                model=load_model(job.checkpoint),
                dtypes=("bfloat16",),
                kernels=host_kernels(),
            )
            save_profile(profile, in_thread_of_its_own(lambda: profile_machine(options)))

    def prepare(self, requests: int, new_tokens: int) -> None:
        """Search the row's policy and load the weights under it."""
        self._stack.close()
        self._run = None
        options = BenchOptions(
            model=self._job.checkpoint,
            profile=self._job.profile,
            prompt_len=len(self._job.prompts[0]),
            gen_len=new_tokens,
            num_requests=requests,
            accelerator=AcceleratorOptions(name="cpu"),
        )
        bench = self._stack.enter_context(Bench(options))
        self._run = self._stack.enter_context(bench.start(bench.policy_file.policy.schedule))

    def close(self) -> None:
        """End the lanes."""
        self._stack.close()

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        """All prompts as one job."""
        assert self._run is not None
        params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        requests = [Request(str(index), tuple(prompt), params) for index, prompt in enumerate(prompts)]
        answers = Answers()
        self._run.repeat(requests=requests, sink=answers)
        return [answers.tokens[request.name] for request in requests]

    def warm_up(self, prompts: Tokens, new_tokens: int) -> dict[str, Any]:
        """Touch everything once; HRM's figures of the row go with it."""
        super().warm_up(prompts, new_tokens)
        assert self._run is not None
        predicted, policy = self._run.bench.predicted, self._run.policy
        return {
            "predicted_tokens_per_s": float(predicted.tokens_per_s),
            "bound_tokens_per_s": float(predicted.bound_tokens_per_s),
            "policy": f"{policy.batch_size} in micro-batches of {policy.micro_batch_size}, "
            f"prefill in chunks of {policy.prefill_chunk_tokens}",
        }


if __name__ == "__main__":
    take_turn(Ours)
