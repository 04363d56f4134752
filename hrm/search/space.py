"""What is searched: what is fixed, and the kinds of policies that are left."""

from dataclasses import KW_ONLY, dataclass, replace
from enum import IntEnum

from hrm.costs import Costs
from hrm.errors import PolicyError
from hrm.estimate import Estimate, estimate
from hrm.formats import Formats
from hrm.hardware import HardwareProfile
from hrm.latency import NO_LIMITS, LatencyLimits
from hrm.model_spec import ModelSpec
from hrm.policy import Parallelism, Policy, ScheduleName
from hrm.schedules import SCHEDULES
from hrm.tasks import Device
from hrm.workload import Workload


class KvPlace(IntEnum):
    """How much of the KV cache lives on the GPU."""

    NONE = 0
    SOME = 1
    ALL = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """Policies that differ in numbers only; the devices are 1 for the GPU and 0 for the CPU."""

    gpu_attention: int
    gpu_ffn: int
    kv: KvPlace

    @staticmethod
    def of_policy(policy: Policy) -> "Kind":
        """The kind that a policy is of."""
        on_gpu = policy.gpu_kv_micro_batches
        everywhere = KvPlace.ALL if on_gpu == policy.num_micro_batches else KvPlace.SOME
        return Kind(
            gpu_attention=int(policy.attention is Device.GPU),
            gpu_ffn=int(policy.ffn is Device.GPU),
            kv=everywhere if on_gpu else KvPlace.NONE,
        )


@dataclass(frozen=True, slots=True)
class Space:
    """What is asked of a search; `attention`, `ffn` and `prefill_ffn` of None leave the device open.

    So does a `parallelism` of None the way in which several GPUs share the model.

    Micro-batch sizes and their number are searched up to `max_micro_batch_size` and
    `max_micro_batches`. Policies whose requests wait longer than `limits` are no part of it; the
    closed form must fall short of them by the factors of `slack`, for first tokens and for others.
    An empty `weight_format` or `kv_format` is the dtype; what is packed, the model says.
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
    attention: Device | None = None
    ffn: Device | None = None
    prefill_ffn: Device | None = None
    parallelism: Parallelism | None = None
    max_micro_batch_size: int = 2**20
    max_micro_batches: int = 2**12
    limits: LatencyLimits = NO_LIMITS
    slack: tuple[float, float] = (1.0, 1.0)

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
                    f"is not where {self.profile.name} computes: its {only.value.upper()} does all",
                    "leave it out",
                )

    @property
    def everything(self) -> int:
        """How many routed experts the model has in all its layers."""
        return self.spec.num_expert_layers * self.spec.num_experts

    def kinds(self) -> list[Kind]:
        """The kinds of policies to search.

        Where the whole cache lives on the GPU, attention runs there whatever is said of it: that
        kind is listed once for each device of the FFN.
        """
        devices = self.devices()
        all_on_gpu = not self.profile.has_accelerator or SCHEDULES[self.schedule].kv_on_gpu
        places = [KvPlace.ALL] if all_on_gpu else [KvPlace.NONE, KvPlace.SOME, KvPlace.ALL]
        first = devices[0][0]
        return [
            Kind(attention, ffn, kv)
            for attention, ffn in devices
            for kv in places
            if kv is not KvPlace.ALL or attention == first
        ]


def _choices(device: Device | None) -> tuple[int, ...]:
    """0 for the CPU, 1 for the GPU, both where the device is open."""
    return (1, 0) if device is None else (int(device is Device.GPU),)
