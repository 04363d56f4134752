"""What is searched: what is fixed, and the kinds of policies that are left."""

from dataclasses import KW_ONLY, dataclass, replace
from enum import IntEnum
from typing import Final

from hrm.contract.rings import WEIGHT_SLOTS
from hrm.costs import Costs
from hrm.errors import PolicyError
from hrm.estimate import Estimate, Prospect, estimate
from hrm.formats import Formats
from hrm.hardware import HardwareProfile
from hrm.latency import NO_LIMITS, LatencyLimits
from hrm.layers import ExpertDivision
from hrm.model_spec import ModelSpec
from hrm.policy import Parallelism, Policy, ScheduleName
from hrm.schedules import SCHEDULES
from hrm.tasks import Device
from hrm.workload import Workload

_PARTS_IN_ROOM: Final = 32  # parts of experts that would fill the GPU: two of them leave nearly all of it


class KvPlace(IntEnum):
    """How much of the KV cache lives on the GPU."""

    NONE = 0
    SOME = 1
    ALL = 2

    @staticmethod
    def of(on_gpu: int, num_micro_batches: int) -> "KvPlace":
        """How much it is where so many micro-batches have theirs there."""
        everywhere = KvPlace.ALL if on_gpu == num_micro_batches else KvPlace.SOME
        return everywhere if on_gpu else KvPlace.NONE


@dataclass(frozen=True, slots=True)
class Kind:
    """Policies that differ in numbers only; the devices are 1 for the GPU and 0 for the CPU."""

    gpu_attention: int
    gpu_ffn: int
    kv: KvPlace

    @staticmethod
    def of_policy(policy: Policy) -> "Kind":
        """The kind that a policy is of."""
        return Kind(
            gpu_attention=int(policy.attention is Device.GPU),
            gpu_ffn=int(policy.ffn is Device.GPU),
            kv=KvPlace.of(policy.gpu_kv_micro_batches, policy.num_micro_batches),
        )


@dataclass(frozen=True, slots=True)
class Space:
    """What is asked of a search; `attention`, `ffn` and `prefill_ffn` of None leave the device open.

    So does a `parallelism` of None the way in which several GPUs share the model, and an `expert_division` of
    None what each has of the experts; a given one is of tensor parallelism, the only one that is searched then.
    With `all_gpus` no policy leaves out a GPU.

    Micro-batch sizes and their number are searched up to `max_micro_batch_size` and
    `max_micro_batches`. Policies whose requests wait longer than `limits` are no part of it; the
    closed form must fall short of them by the factors of `slack`, for first tokens and for others.
    An empty `weight_format` or `kv_format` is the dtype; what is packed, the model says. With
    `experts_per_part` all experts that stream do so in such parts. Where another space is known to hold a policy with
    `known_tokens_per_s`, slower ones are of no interest here, but for one to tell how fast this space is. Only
    `kinds_left` are searched, if they are given: others are known to be no better.
    """

    spec: ModelSpec
    profile: HardwareProfile
    workload: Workload
    _: KW_ONLY
    dtype: str = "bfloat16"
    weight_format: str = ""
    kv_format: str = ""
    schedule: ScheduleName = ScheduleName.CGOPIPE
    staging: bool = False
    experts_per_part: int = 0
    attention: Device | None = None
    ffn: Device | None = None
    prefill_ffn: Device | None = None
    parallelism: Parallelism | None = None
    expert_division: ExpertDivision | None = None
    all_gpus: bool = False
    max_micro_batch_size: int = 2**20
    max_micro_batches: int = 2**12
    limits: LatencyLimits = NO_LIMITS
    slack: tuple[float, float] = (1.0, 1.0)
    known_tokens_per_s: float = 0.0
    kinds_left: frozenset[Kind] | None = None

    @property
    def formats(self) -> Formats:
        """Weights, KV cache and compute of all its policies."""
        return Formats.named(self.dtype, weights=self.weight_format, kv_cache=self.kv_format)

    @property
    def costs(self) -> Costs:
        """What tasks cost."""
        return Costs(self.spec, self.profile, self.formats)

    def predicted(self, policy: Policy) -> Estimate:
        """What a policy of the space does, simulated."""
        return estimate(self.spec, policy, self.profile, self.workload)

    def prospect(self, policy: Policy) -> Prospect:
        """What a policy of the space may do, before it is simulated."""
        return Prospect(self.spec, policy, self.profile, self.workload)

    def predicted_above(self, tokens_per_s: float, policy: Policy) -> Estimate | None:
        """The same; None as soon as it is known that the policy is slower than that."""
        return self.prospect(policy).above(tokens_per_s)

    def allowed_above(self, tokens_per_s: float, policy: Policy) -> Estimate | None:
        """The same; None also if the limits on waiting times are missed."""
        predicted = self.predicted_above(tokens_per_s, policy)
        return predicted if predicted is not None and self.limits.are_met(predicted.latency) else None

    def holding(self, policy: Policy) -> "Space":
        """The variant that a policy is of."""
        return replace(self, staging=policy.staging, experts_per_part=policy.experts_per_part)

    def in_parts(self, besides: Policy | None) -> "list[Space]":
        """The space with experts that stream in small parts, where that may be better than the best policy without.

        That is where whole layers leave little room: two of them do not fit beside all projections, and
        the best policy streams none in prefill, or they take more than three quarters of the memory.
        """
        spec, weights, room = self.spec, self.formats.weights, self.profile.top.usable_bytes
        expert, may = spec.expert_bytes(weights), self.profile.has_accelerator and SCHEDULES[self.schedule].ffn is None
        if not may or self.prefill_ffn is Device.CPU or self.staging or self.experts_per_part:
            return []
        slots = WEIGHT_SLOTS * spec.num_experts * expert
        others = spec.total_layer_bytes(weights) - self.everything * expert + weights.bytes_of(spec.head_parameters)
        streams = besides is not None and besides.prefill_ffn is Device.GPU
        if slots + others <= room or (streams and slots <= 0.75 * room):
            return []
        per_part = max(1, room // (_PARTS_IN_ROOM * expert))
        small = per_part < spec.num_experts
        return [replace(self, experts_per_part=per_part, prefill_ffn=Device.GPU)] if small else []

    def of_pinning(self) -> "list[Space]":
        """This space, and where its host pins a part of its memory the one with weights staged."""
        profile, host = self.profile, self.profile.host
        pins_a_part = profile.has_accelerator and host.pinnable_bytes is not None
        can_stage = pins_a_part and profile.has_link(host.name, host.name, "staging")
        return [self, replace(self, staging=True)] if can_stage and not self.staging else [self]

    def devices(self) -> list[tuple[int, int]]:
        """(attention on GPU, FFN on GPU) pairs that the schedule and the machine allow."""
        if not self.profile.has_accelerator:
            self._check_only_device()
            return [(1, 1)]
        schedule = SCHEDULES[self.schedule]
        for flag, asked, fixed in (
            ("--attention", self.attention, schedule.attention),
            ("--ffn", self.ffn, schedule.ffn),
        ):
            if asked is not None and fixed is not None and asked is not fixed:
                raise PolicyError(
                    flag,
                    asked.value,
                    f"is {fixed.value} under schedule {self.schedule.value}",
                    "leave it out, or evaluate the policy with hrm estimate",
                )
        attention, ffn = _choices(self.attention or schedule.attention), _choices(self.ffn or schedule.ffn)
        if self.prefill_ffn is Device.CPU:
            ffn = tuple(device for device in ffn if not device)
            if not ffn:
                raise PolicyError("--prefill-ffn", "cpu", "goes with experts on the CPU", "leave it out")
        return [(a, f) for a in attention for f in ffn]

    def prefill_devices(self, gpu_ffn: int) -> tuple[int, ...]:
        """Where prefill may compute the experts that are not resident: 1 for the GPU, 0 for the CPU."""
        return (1,) if gpu_ffn else _choices(self.prefill_ffn)

    def _check_only_device(self) -> None:
        only = Device.GPU if self.profile.has_gpu else Device.CPU
        for flag, asked in (("--attention", self.attention), ("--ffn", self.ffn), ("--prefill-ffn", self.prefill_ffn)):
            if asked not in {None, only}:
                raise PolicyError(
                    flag,
                    asked and asked.value,
                    f"is not where {self.profile.name} computes: its {only.words} does all",
                    "leave it out",
                )

    def _check_parts(self) -> None:
        count, most = self.experts_per_part, self.spec.num_experts
        if not count:
            return
        for holds, rule in (
            (count <= most, f"must be at most the {most} experts of a layer of {self.spec.name}"),
            (
                self.profile.has_accelerator,
                f"is of experts that move to a GPU's memory, of which {self.profile.name} has none of its own",
            ),
            (self.prefill_ffn is not Device.CPU, "does not go with --prefill-ffn cpu, where no experts move"),
            (not self.staging, "does not go with --staging, whose pinned buffers hold pages of whole layers"),
        ):
            if not holds:
                raise PolicyError("--experts-per-part", count, rule, "leave it out")

    @property
    def everything(self) -> int:
        """How many routed experts the model has in all its layers."""
        return self.spec.num_expert_layers * self.spec.num_experts

    def kinds(self) -> list[Kind]:
        """The kinds of policies to search.

        Where the whole cache lives on the GPU, attention runs there whatever is said of it: that
        kind is listed once for each device of the FFN.
        """
        self._check_parts()
        devices = self.devices()
        all_on_gpu = not self.profile.has_accelerator or SCHEDULES[self.schedule].kv_on_gpu
        places = [KvPlace.ALL] if all_on_gpu else [KvPlace.NONE, KvPlace.SOME, KvPlace.ALL]
        first = devices[0][0]
        kinds = [
            Kind(attention, ffn, kv)
            for attention, ffn in devices
            for kv in places
            if kv is not KvPlace.ALL or attention == first
        ]
        return [kind for kind in kinds if self.kinds_left is None or kind in self.kinds_left]


def _choices(device: Device | None) -> tuple[int, ...]:
    """0 for the CPU, 1 for the GPU, both where the device is open."""
    return (1, 0) if device is None else (int(device is Device.GPU),)
