"""The hierarchical roofline: an operator on a level of a machine, in seconds and in FLOP/s.

MoE-Lightning, arXiv 2411.11217, §3. A task takes its launches' latency and then, kernel by kernel,
the longest of the roofs that it touches: compute and memory of its level.
"""

from dataclasses import dataclass

from hrm.formats import Formats
from hrm.hardware import HardwareProfile, MemoryLevel
from hrm.layers import Kernel, Operator
from hrm.model_spec import ModelSpec
from hrm.numeric import Number, maximum


def kernel_seconds(kernel: Kernel, level: MemoryLevel, dtype: str) -> Number:
    """Longest of the compute roof and the memory roof (for attention: its kernel's read rate)."""
    bandwidth = level.attention_bytes_per_s if kernel.reads_kv else level.read_bytes_per_s.at()
    compute = level.processor.flops_per_s(dtype, None if kernel.reads_kv else kernel.rows, code=kernel.code)
    return maximum(kernel.flops / compute, kernel.num_bytes / bandwidth)


def operator_seconds(
    operator: Operator, level: MemoryLevel, dtype: str, *, fused: bool = False, writes_out: bool = False
) -> Number:
    """Latency of launches and requests, and the roofs of the kernels, one after the other.

    With `fused` no operator is split into several kernels, whether or not the processor's are. Where the
    level `writes_out` packed weights as plain numbers before it multiplies, that takes its time, too.
    """
    work: Number = 0
    for kernel in operator.kernels:
        work = work + kernel_seconds(kernel, level, dtype)
    processor = level.processor
    if processor.attention_request_s is not None:
        work = work + operator.requests * processor.attention_request_s.value
    launches = operator.launches
    if not (fused or processor.fuses_operators):
        launches = launches + operator.unfused_launches - processor.groups_experts * operator.saved_by_grouping
        if writes_out:
            moved = sum(kernel.written_out_bytes for kernel in operator.kernels)
            work = work + moved / level.read_bytes_per_s.at()
            launches = launches + sum(kernel.written_out_launches for kernel in operator.kernels)
    return launches * processor.launch_latency_s.value + work


def attainable_flops_per_s(*, compute: float, bandwidth: float, intensity: float) -> float:
    """Eq. 7 of §3 of data that lies at the level: min(P_i, B_i·I^i)."""
    return min(compute, bandwidth * intensity)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurningPoints:
    """Where an operator whose data lies on the host stands between the roofs (FLOPs a byte).

    `intensity` is FLOPs a byte of what lies on the host. Below `p1` the GPU is no faster than the
    host itself; below `p2` the link is the limit; `balance` is where link and GPU memory agree:
    `gpu_intensity` × (GPU bandwidth / link bandwidth).
    """

    intensity: float
    gpu_intensity: float
    p1: float
    p2: float
    balance: float

    @property
    def verdict(self) -> str:
        """What follows from the intensity, in words."""
        if self.intensity < self.p1:
            return "left of P1: faster on the CPU, where its data lies"
        if self.intensity < self.p2:
            return "between P1 and P2: faster on the GPU, limited by the link"
        return "right of P2: limited by the GPU, not by the link"


def turning_points(
    profile: HardwareProfile,
    dtype: str,
    *,
    flops: float,
    host_bytes: float,
    gpu_bytes: float,
    rows: float | None,
    reads_kv: bool = False,
) -> TurningPoints:
    """P1, P2 and balance point (eqs. 9–11) of work whose data lies on the host.

    `rows` picks the compute rate on the GEMM curve of both processors.
    """
    gpu, cpu, link = profile.top, profile.host, profile.h2d.bandwidth_bytes_per_s.at()
    host_intensity, gpu_intensity = flops / host_bytes, flops / gpu_bytes
    cpu_read = cpu.attention_bytes_per_s if reads_kv else cpu.read_bytes_per_s.at()
    gpu_read = gpu.attention_bytes_per_s if reads_kv else gpu.read_bytes_per_s.at()
    on_cpu = min(cpu.processor.flops_per_s(dtype, rows), cpu_read * host_intensity)
    on_gpu = min(gpu.processor.flops_per_s(dtype, rows), gpu_read * gpu_intensity)
    return TurningPoints(
        intensity=host_intensity,
        gpu_intensity=gpu_intensity,
        p1=on_cpu / link,
        p2=on_gpu / link,
        balance=gpu_read * gpu_intensity / link,
    )


def attention_turning_points(
    profile: HardwareProfile, spec: ModelSpec, formats: Formats, *, context: float
) -> TurningPoints:
    """Turning points of decode attention: every request reads its own cache, whatever the batch.

    Of layers with windows of different widths, it is the widest.
    """
    operator = spec.widest_kind.mixer.attend(formats, 1, context)
    return turning_points(
        profile,
        formats.compute.name,
        flops=float(operator.flops),
        host_bytes=float(operator.num_bytes),
        gpu_bytes=float(operator.num_bytes),
        rows=None,
        reads_kv=True,
    )


def ffn_turning_points(
    profile: HardwareProfile, spec: ModelSpec, formats: Formats, *, batch_size: int, micro_batch_size: int
) -> TurningPoints:
    """Turning points of the MoE FFN.

    Weights cross the link once a batch, and are read from GPU memory once a micro-batch.
    """
    micro_batch = spec.expert_kind.run_experts(formats, micro_batch_size, spec.num_experts)
    weight_bytes = spec.experts_hit(batch_size) * spec.expert_bytes(formats.weights)
    num_micro_batches = batch_size / micro_batch_size
    return turning_points(
        profile,
        formats.compute.name,
        flops=float(micro_batch.flops) * num_micro_batches,
        host_bytes=float(weight_bytes),
        gpu_bytes=float(micro_batch.num_bytes) * num_micro_batches,
        rows=float(micro_batch.kernels[0].rows),
    )
