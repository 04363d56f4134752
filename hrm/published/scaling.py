"""From two T4s to four: what MoE-Lightning measured, what is predicted, and what bounds the batch.

The machines are put together from the T4 of paper-s1 and the catalog's host with 32 cores and
416 GB; nothing is fitted on these runs. GCP gives a machine with two T4s at most 48 vCPUs and
312 GB (its documentation, as in SkyPilot's catalog), so on GCP the runs on two cards had a machine
with four, of which MoE-Lightning takes the first two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from hrm.closed_form import Point
from hrm.formats import Formats
from hrm.hardware import HardwareProfile, Host, Link, Rate, Source
from hrm.machines import assemble, load_gpu, load_host, load_profile
from hrm.model_spec import ModelSpec, load_model
from hrm.published.compare import ClosedForm, ComparedRun, closed_form, compare, machine_name
from hrm.published.data import GENERATED, SEVERAL_GPUS, PublishedRun
from hrm.published.systems import DTYPE
from hrm.tasks import Phase
from hrm.units import GIB

NUM_GPUS: Final = {"S6": 2, "S7": 4, "S8": 2, "S9": 4}
PAIRS: Final = (("S6", "S7"), ("S8", "S9"))
HOST: Final = "gcp-n1-highmem-64"

# What MoE-Lightning's own planner may use of a card's 15 GiB and of the host's 416 GiB.
CARD_BYTES: Final = 15 * GIB
HOST_BYTES: Final = 416 * GIB
GPU_SHARE: Final = 0.86
HOST_SHARE: Final = 0.8
TEMPORARIES_MARGIN: Final = 1.2
_FORMATS: Final = Formats.of(DTYPE)


def machine_of(setup: str, *, shared_links: bool = False) -> HardwareProfile:
    """The setup's machine; with `shared_links`, two cards have the bandwidth of one link."""
    s1, host = load_profile(machine_name("S1")), load_host(HOST)
    share = 0.5 if shared_links else 1.0
    card = replace(load_gpu("T4"), level=s1.top, h2d=_share(s1.h2d, share), d2h=_share(s1.d2h, share))
    return assemble(card, NUM_GPUS[setup], _with_attention_of(host, s1))


def _share(link: Link, share: float) -> Link:
    if share == 1:
        return link
    figure = link.bandwidth_bytes_per_s.planned.times(share, source=Source.ASSUMED, note="two cards share one link")
    return replace(link, bandwidth_bytes_per_s=Rate(achieved=figure))


def _with_attention_of(host: Host, machine: HardwareProfile) -> Host:
    """The host with the other machine's CPU attention, by its number of cores."""
    cores = host.level.processor.cores / machine.host.processor.cores
    rate = machine.host.processor.attention_bytes_per_s
    assert rate is not None, machine.name
    figure = rate.planned.times(cores, source=Source.DERIVED, note=f"as {machine.name}, by the number of cores")
    processor = replace(host.level.processor, attention_bytes_per_s=Rate(achieved=figure))
    return replace(host, level=replace(host.level, processor=processor))


@dataclass(frozen=True, slots=True)
class BatchLimit:
    """The most requests that MoE-Lightning's planner lets a batch hold, and the level it fills."""

    batch_size: int
    level: str


def batch_limit(run: PublishedRun) -> BatchLimit:
    """The batch that MoE-Lightning's memory rule allows at the run's micro-batch size.

    As read in its artifact, in our words. On the GPUs: all projections, two slots of a layer's
    experts, two KV buffers of a micro-batch, its temporaries over whole prompts, and on each GPU
    the hidden states of its micro-batch twice and of the whole batch's prompts once. On the host:
    all experts, the cache, those hidden states once for each GPU, and two pinned layers. No expert
    stays on a GPU.
    """
    spec, gpus, prompt = load_model(run.model), NUM_GPUS[run.setup], run.workload.prompt_len
    attention = spec.attention
    experts = _FORMATS.weights.bytes_of(spec.num_experts, spec.expert_parameters)
    hidden = _FORMATS.compute.bytes_of(gpus * prompt, spec.hidden_size)
    on_gpu = (
        _FORMATS.weights.bytes_of(spec.num_layers, attention.projection_parameters + attention.output_parameters)
        + 2 * experts
        + run.micro_batch_size * (2 * hidden + _temporaries(spec, gpus, prompt))
        + 2 * run.micro_batch_size * prompt * attention.cached_bytes(_FORMATS)
    )
    on_host = (spec.num_layers + 2) * experts
    cache = run.workload.mean_context_len * spec.kv_bytes_per_token(_FORMATS)
    limits = {
        "GPU memory": (GPU_SHARE * gpus * CARD_BYTES - on_gpu) / hidden,
        "host memory": (HOST_SHARE * HOST_BYTES - on_host) / (cache + hidden),
    }
    level = min(limits, key=lambda name: limits[name])
    micro_batches = int(limits[level] / run.micro_batch_size)
    return BatchLimit(micro_batches * run.micro_batch_size, level)


def _temporaries(spec: ModelSpec, gpus: int, prompt: float) -> float:
    """Bytes of a prompt's routed tokens in the fused expert kernel."""
    routed = prompt * spec.experts_per_token
    elements = routed * (gpus * spec.hidden_size + 3 * spec.intermediate_size)
    return float(TEMPORARIES_MARGIN * _FORMATS.compute.bytes_of(elements))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """The same workload on two GPUs and on four, each with its published batch.

    `shared_two` and `shared_four` are what would be predicted if two cards shared one link.
    """

    two: ComparedRun
    four: ComparedRun
    shared_two: ClosedForm
    shared_four: ClosedForm

    @property
    def published_ratio(self) -> float:
        """Throughput of four over two as measured."""
        return self.four.run.tokens_per_s / self.two.run.tokens_per_s

    @property
    def predicted_ratio(self) -> float:
        """Throughput of four over two as predicted, each with its published batch."""
        return self.four.predicted.tokens_per_s / self.two.predicted.tokens_per_s

    @property
    def shared_ratio(self) -> float:
        """The same if two cards shared one link."""
        return self.shared_four.tokens_per_s / self.shared_two.tokens_per_s

    @property
    def requests_ratio(self) -> float:
        """Requests in a batch on four GPUs over those on two.

        Also the most that four can give over two where the host as a whole sets the step, as its
        memory or its cores: a step's weights are then divided among so many more requests.
        """
        return self.four.run.batch_size / self.two.run.batch_size

    @property
    def gpu_ceiling(self) -> float:
        """The most if each GPU's work grows with its requests: kernels, its part of the cache."""
        return NUM_GPUS[self.four.run.setup] / NUM_GPUS[self.two.run.setup]

    @property
    def link_ceiling(self) -> float:
        """The most if weights over the GPUs' own links set the step."""
        return self.gpu_ceiling * self.requests_ratio

    @property
    def published_time_ratio(self) -> float:
        """Time of a batch on four GPUs over that on two, as measured."""
        return self.requests_ratio / self.published_ratio

    @property
    def predicted_time_ratio(self) -> float:
        """The same as predicted."""
        return self.requests_ratio / self.predicted_ratio


def compare_scaling() -> list[Scaling]:
    """Both models, 32 to 256 generated tokens."""
    setups = [setup for pair in PAIRS for setup in pair]
    found = {
        (comparison.run.setup, comparison.run.workload.gen_len): comparison
        for comparison in compare(SEVERAL_GPUS, {setup: machine_of(setup) for setup in setups})
    }
    shared = {setup: machine_of(setup, shared_links=True) for setup in setups}
    return [
        Scaling(
            two=found[two, generated],
            four=found[four, generated],
            shared_two=closed_form(found[two, generated].run, shared[two]),
            shared_four=closed_form(found[four, generated].run, shared[four]),
        )
        for two, four in PAIRS
        for generated in GENERATED
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """Mean seconds of a measured decode step, if prefill took as long as predicted.

    The rates are those of one GPU, if nothing else filled the step: weights over its link, and its
    part of the cache read by its process's attention on the CPU.
    """

    seconds: float
    weights_bytes_per_s: float
    cache_bytes_per_s: float


def measured_step(comparison: ComparedRun) -> MeasuredStep:
    """The decode step that a run's measured time leaves, and what it would ask of each GPU."""
    run, policy = comparison.run, comparison.predicted.policy
    spec, workload, gpus = load_model(run.model), run.workload, NUM_GPUS[run.setup]
    seconds = (run.seconds - comparison.predicted.prefill.seconds) / workload.decode_steps
    of_layer = Point.of_policy(policy, spec).streamed_bytes(spec, _FORMATS.weights, Phase.DECODE)
    weights = spec.num_layers * float(of_layer)
    context = workload.prompt_len + (1 + workload.decode_steps) / 2
    cache = run.batch_size * context * spec.kv_bytes_per_token(_FORMATS)
    return MeasuredStep(
        seconds=seconds, weights_bytes_per_s=weights / gpus / seconds, cache_bytes_per_s=cache / gpus / seconds
    )


def gpu_memory_left_bytes(comparison: ComparedRun) -> float:
    """Bytes of one GPU that hrm's formulas leave free in a published run."""
    gpu = comparison.predicted.memory.gpu
    return (gpu.capacity_bytes - gpu.planned_bytes) / NUM_GPUS[comparison.run.setup]


def published_steps_s(runs: Sequence[PublishedRun]) -> list[float]:
    """Seconds of a decode step between published runs of one batch that generate ever more.

    Empty if their batches differ.
    """
    if len({run.batch_size for run in runs}) > 1:
        return []
    return [
        (second.seconds - first.seconds) / (second.workload.decode_steps - first.workload.decode_steps)
        for first, second in pairwise(runs)
    ]
