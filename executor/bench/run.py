"""A policy under several schedules, on prompts of random tokens."""

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self, final
from zlib import crc32

from executor.batching import Request, Sink
from executor.bench.plan import BenchOptions, at_once, cut, model_of, solved, workload_of
from executor.bench.row import BenchRow
from executor.errors import JobError
from executor.generate import AbstractGenerator
from executor.job.launch import Reports, launching
from executor.job.machine import as_run, budgeted_plan, check_model
from executor.job.model_part import ModelPart
from executor.job.rank import RankJob
from executor.job.report import Beginning, Counted, Totals, run_record
from executor.loading import Loading
from executor.null_generator import NullGenerator
from executor.sampling import SamplingParams
from executor.weight_pages import StoredWeights
from hrm.acts.decode import CPU_EXPERTS
from hrm.errors import PolicyError
from hrm.estimate import Estimate, estimate
from hrm.model_spec import ModelSpec
from hrm.policy import Policy, ScheduleName
from hrm.policy_file import PolicyFile, load_policy_file
from hrm.profiling.pinned import keeping
from hrm.run_record import PhaseRecord
from hrm.tasks import Device, Lane, Phase
from hrm.validate import runtime_with, validate

if TYPE_CHECKING:
    from hrm.trace import Span


@final
class Bench:
    """A model and a policy made ready; a context manager that holds the checkpoint open.

    `policy_file` is what is run, cut to the layers asked for; `predicted` is it at the lengths of
    the requests. If the machine does not pin as much as planned, both are of what is then run, and
    `tell` is called with a line about it. `loading` tells how far memory and weights are that runs start with. Raises
    HrmError if model and policy do not go together, or if no policy fits.
    """

    def __init__(
        self, options: BenchOptions, tell: Callable[[str], object] = lambda _: None, loading: Loading | None = None
    ) -> None:
        self._options, self._tell, self._loading = options, tell, loading or Loading()
        self._told: set[str] = set()
        self.model = options.model if isinstance(options.model, str) else options.model.name
        with ExitStack() as stack:
            (self._family, self._source, self._arch), self._located = model_of(options, stack)
            self.policy_file = self._planned()
            self._stack = stack.pop_all()
        usual = self.policy_file.workload
        if options.policy is not None:
            usual = replace(usual, num_requests=at_once(self.policy_file))
        self.policy_file = replace(self.policy_file, workload=workload_of(options, usual))
        self.predicted = self.estimate(self.policy_file.policy)
        self._first: float | None = None
        self._before: BenchRun | None = None
        self._launched = ExitStack()  # other ranks

    def __enter__(self) -> Self:
        """Keep pinned memory from one run to the next."""
        self._stack.enter_context(keeping())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the checkpoint, and let go of what was loaded, and of other ranks."""
        self._before = None
        with self._stack:
            self._launched.__exit__(kind, error, traceback)

    @property
    def spec(self) -> ModelSpec:
        """The model, of as many layers as are run."""
        return self._arch.spec

    @property
    def schedules(self) -> Sequence[ScheduleName]:
        """Those to run, in order."""
        if self._options.schedules is not None:
            return self._options.schedules
        if self.policy_file.profile.has_accelerator:
            return tuple(ScheduleName)
        return (self.policy_file.policy.schedule,)

    def row(self, schedule: ScheduleName) -> BenchRow:
        """Run all repeats under a schedule, on the weights of the row before if they are where it needs them."""
        with self._ready(schedule) as run:
            for _repeat in range(self._options.repeats):
                run.repeat()
            row = run.row()
        self._first = row.tokens_per_s if self._first is None else self._first
        return replace(row, ratio=row.tokens_per_s / self._first)

    def _ready(self, schedule: ScheduleName) -> "BenchRun":
        if self._before is not None:
            with suppress(PolicyError):
                return self._before.under(schedule)
            self._before = None
            self._launched.close()
            gc.collect()  # the host may not have room for both
        run = self.start(schedule)
        self._before = run if run.computes else None
        return run

    def start(self, schedule: ScheduleName, *, gen_len: int | None = None, max_spans: int = 0) -> "BenchRun":
        """Load the weights and get ready to run repeats one by one, say in turn with another's.

        With a `gen_len`, so many new tokens a request, no more than were planned for. At most so many
        spans are kept, of the first steps.
        """
        policy_file = replace(self.policy_file, policy=replace(self.policy_file.policy, schedule=schedule))
        own = ModelPart.of(StoredWeights(self._source, self._family), self._arch, policy_file)
        job = RankJob(
            model=self._located and self._located.folder,
            model_name=self._located.name if self._located else "",
            seed=self._options.seed,
            policy_file=policy_file,
            accelerator=self._options.accelerator,
            eos_token_ids=self._arch.eos_token_ids,
            max_spans=max_spans,
        )
        launch = self._launched.enter_context(launching(job, self._arch, own, gpus=self._options.gpus))
        generator, reports = self._launched.enter_context(launch.loaded(self._loading))
        self._loading.end()
        as_planned = as_run(policy_file, generator.policy, generator.pageable)
        if as_planned is not policy_file:
            self.policy_file = as_planned
            self.predicted = self.estimate(as_planned.policy, pageable=generator.pageable)
        if generator.notice and generator.notice not in self._told:
            self._told.add(generator.notice)
            self._tell(generator.notice)
        return BenchRun(self, Loaded(generator, reports, own), as_planned.policy, gen_len=gen_len)

    def requests(self, gen_len: int | None = None) -> Iterator[Request]:
        """The requests of every repeat; nothing but their length ends them."""
        workload = self.policy_file.workload
        assert workload.num_requests is not None, "as planned"
        new = workload.gen_len if gen_len is None else gen_len
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        generator = random.Random(self._options.seed)
        lengths = workload.prompt_lengths(workload.num_requests)
        generator.shuffle(lengths)
        for index, length in enumerate(lengths):
            prompt = tuple(generator.choices(range(self.spec.vocab_size), k=length))
            yield Request(f"bench-{index}", prompt, params)

    def _planned(self) -> PolicyFile:
        """The policy given, or the one searched for, for as many layers as are run."""
        given, spec = self._options.policy, self.spec
        if given is None:
            return solved(self._options, spec)
        if self._options.profile is not None:
            raise JobError(
                "--profile",
                self._options.profile,
                "does not go with --policy, whose file holds its machine",
                "leave one of them out",
            )
        policy_file = given if isinstance(given, PolicyFile) else load_policy_file(given)
        if self._options.num_layers is not None:
            policy_file = cut(policy_file, self._options.num_layers)
        check_model(spec, policy_file, given if isinstance(given, Path) else "policy")
        return policy_file

    def estimate(self, policy: Policy, *, gen_len: int | None = None, pageable: Sequence[str] = ()) -> Estimate:
        """What is predicted of a policy at the lengths of the requests.

        `pageable` are purposes of the host's memory that should be pinned but are not.
        """
        plan = self.policy_file
        workload = plan.workload if gen_len is None else replace(plan.workload, gen_len=gen_len)
        runtime = runtime_with(pageable, plan.profile)
        return estimate(self.spec, policy, plan.profile, workload, runtime=runtime)


class Loaded(NamedTuple):
    """What runs, what other ranks tell of it, and the part of the model and of the policy that this process has."""

    generator: AbstractGenerator
    reports: Reports
    own: ModelPart


@final
class BenchRun:
    """One schedule being run; a context manager that owns the lanes.

    `policy` is what is run, on weights and in memory that other orders may share, and `spans` what is
    kept of the last repeat. It may be entered again, so that another may compute with all cores in between.
    """

    def __init__(self, bench: Bench, loaded: Loaded, policy: Policy, *, gen_len: int | None = None) -> None:
        self.bench, self.policy = bench, policy
        self._loaded, self._generator, self._gen_len = loaded, loaded.generator, gen_len
        self._beginning, self._runs = Beginning(weights=bench.model), list[Counted]()  # of all requests, a repeat each
        self._checksums = set[int]()
        self.spans: tuple[Span, ...] = ()

    @property
    def computes(self) -> bool:
        """Whether there are weights, and tokens come of them."""
        return not isinstance(self._generator, NullGenerator)

    @property
    def load_s(self) -> float:
        """How long the weights took to be there."""
        return self._generator.load_s

    @property
    def library_bytes(self) -> int:
        """What libraries hold of the GPU's memory beside what is planned."""
        return self._generator.backend.library_bytes

    def __enter__(self) -> Self:
        """Start the lanes."""
        self._generator.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the lanes."""
        self._generator.__exit__(*exception)

    def under(self, schedule: ScheduleName, *, gen_len: int | None = None) -> "BenchRun":
        """The same policy in another order, on the weights and in the memory of this run.

        PolicyError if the order needs other memory, as staging whole layers does.
        """
        policy, own = replace(self.policy, schedule=schedule), self._loaded.own.policy_file
        plan = budgeted_plan(own, replace(self._generator.policy, schedule=schedule))
        loaded = self._generator.plan
        if (plan.gpu.purposes, plan.cpu.purposes) != (loaded.gpu.purposes, loaded.cpu.purposes):
            raise PolicyError(
                "policy: schedule",
                schedule.value,
                f"needs memory of other sizes than {self.policy.schedule.value}",
                "load it by itself",
            )
        return BenchRun(self.bench, self._loaded, policy, gen_len=gen_len)

    def repeat(
        self,
        *,
        gen_len: int | None = None,
        num_requests: int | None = None,
        requests: Sequence[Request] | None = None,
        sink: Sink | None = None,
    ) -> Totals:
        """Run all requests once more, or with other new tokens, or only the first few, or others no longer than these.

        `sink` is given their completions.
        """
        self._generator.warm_up()
        totals = Totals()
        if requests is None:
            requests = list(islice(self.bench.requests(self._gen_len if gen_len is None else gen_len), num_requests))
        for request in requests:
            self._generator.check(request)
        tokens, self.spans = dict[str, tuple[int, ...]](), ()
        for batch in self._generator.batches(iter(requests)):
            result = self._generator.generate(batch, sink=sink, schedule=self.policy.schedule)
            totals.add(result)
            self.spans += result.prefill.spans + (result.decode.spans if result.decode else ())
            tokens |= {one.request.name: one.tokens for one in result.completions}
        self._runs.append(Counted(totals, [report.record for report in self._loaded.reports()]))
        self._checksums.add(crc32(repr(sorted(tokens.items())).encode()))
        return totals

    def row(self) -> BenchRow:
        """What was measured in the repeats until now, of which there must be one."""
        bench, generator, policy = self.bench, self._generator, self.policy
        bound = bench.estimate(policy, gen_len=self._gen_len, pageable=generator.pageable)
        runs = sorted(self._runs, key=lambda run: run.totals.tokens_per_s())
        median = runs[(len(runs) - 1) // 2]
        record = run_record(generator, bench.policy_file, median, self._beginning, schedule=policy.schedule)
        totals, validation = record.totals, validate(record)
        prefill, decode = (record.phase(phase) for phase in Phase)
        return BenchRow(
            schedule=policy.schedule.value,
            tokens_per_s=totals.tokens_per_s,
            least_tokens_per_s=runs[0].totals.tokens_per_s(),
            most_tokens_per_s=runs[-1].totals.tokens_per_s(),
            prefill_tokens_per_s=totals.prefill_tokens_per_s,
            decode_tokens_per_s=totals.decode_tokens_per_s,
            decode_step_s=decode.step_s,
            prefill_busy_share={lane: item.busy_share for lane, item in prefill.lanes.items()},
            decode_busy_share={lane: item.busy_share for lane, item in decode.lanes.items()},
            decode_bytes_per_s={name: lane.bytes_per_s for name, lane in decode.lanes.items() if lane.num_bytes},
            attention_bytes_per_s=self._attention_bytes_per_s(decode),
            ratio=1.0,
            predicted_tokens_per_s=validation.tokens_per_s.predicted,
            bound_tokens_per_s=bound.bound_tokens_per_s,
            load_s=generator.load_s,
            tokens_crc32=tuple(sorted(self._checksums)),
            validation=validation,
        )

    def _attention_bytes_per_s(self, decode: PhaseRecord) -> float | None:
        """Keys and values a second of the micro-batches that attend on the CPU; None without."""
        policy, spec = self._generator.policy, self._loaded.own.arch.spec
        in_lane_s, experts_s = decode.lane(Lane.CPU).busy_s, decode.kind(CPU_EXPERTS).seconds
        if policy.attention is not Device.CPU or policy.kv_share_on_gpu == 1 or not in_lane_s:
            return None
        attended = 0
        for request in self.bench.requests(self._gen_len):
            steps = request.params.max_tokens - 1
            attended += steps * len(request.prompt) + steps * (steps + 1) // 2
        read = attended * spec.kv_bytes_per_token(policy.formats)
        return read * (1 - policy.kv_share_on_gpu) / (in_lane_s - experts_s)
