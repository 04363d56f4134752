"""transformers with accelerate's offload: the same shape, dtype, memory and lengths.

What flatters them: all prompts have the mean length, so that no padding is computed; the caps are
on what torch allocates, as ours; the batch size, where the KV cache lies and how many layers stay
on the GPU are the best that a sweep finds. A whole job would take them an hour, so the rates are
those of each phase: one prefill and a few decode steps of the whole model, nothing less.

Weights are random and made in place, without a download: the model is built on the meta device
and each parameter is filled where accelerate is to find it. If the host cannot hold all of them,
layers share one set of experts, which costs as much to move; the file then says so.
"""

import gc
import logging
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from executor.backends.base import host_memory
from executor.checkpoint import RandomWeights
from hrm.formats import FORMATS
from hrm.hardware import HardwareProfile
from hrm.model_spec import ModelSpec
from hrm.numeric import Spread
from hrm.profiling.environment import available_ram_bytes
from hrm.units import format_bytes
from hrm.workload import Workload
from tests.bench.suite.record import Record
from tests.bench.suite.schedules import machine_of
from tests.bench.suite.setting import Setting

SWEEP_STEPS: Final = 2
HOST_SHARE: Final = 0.9  # of the free memory that weights may take before layers share experts
CACHES: Final = ("dynamic", "offloaded")  # on the GPU, or on the host and moved layer by layer
# Their default, grouped_mm, turns into batched_mm for decoding on a GPU, which copies both experts
# of every token: 0.7 GB, so nothing fits. This takes the least memory, and so the largest batches.
EXPERTS: Final = "eager"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One batch size: seconds of prefill and of a decode step, and the most bytes on the GPU."""

    batch_size: int
    cache: str
    resident_layers: int
    prefill_s: float
    step_s: Spread
    peak_bytes: int

    def tokens_per_s(self, gen_len: int) -> float:
        """Of a batch with so many new tokens, put together from its phases."""
        seconds = self.prefill_s + (gen_len - 1) * self.step_s.median
        return self.batch_size * gen_len / seconds

    def to_json(self, workload: Workload) -> dict[str, Any]:
        """Everything, with rates."""
        fields = {name: getattr(self, name) for name in type(self).__dataclass_fields__}
        return {
            **fields,
            "tokens_per_s": self.tokens_per_s(workload.gen_len),
            "prefill_tokens_per_s": self.batch_size * round(workload.prompt_len) / self.prefill_s,
            "decode_tokens_per_s": self.batch_size / self.step_s.median,
        }


def measure(setting: Setting, cap: str) -> None:
    """Sweep batch sizes under a cap, then measure the best one longer."""
    record = Record(setting, f"accelerate-{cap}")
    if record.complete:
        return
    machine = machine_of(setting, cap)
    side = OtherSide(setting, machine.spec, machine.profile, setting.scale.gpu_memory_bytes[cap])
    record.put("model", {"name": side.spec.name, "num_layers": side.spec.num_layers})
    record.put("gpu_memory_bytes", side.gpu_memory_bytes)
    record.put("weights", side.weights)
    record.put("experts", EXPERTS)
    record.put("build_s", side.build_s)
    workload = setting.scale.workload
    points: list[Point] = []
    best: Point | None = None
    try:
        for point in sweep(setting, record, side):
            points.append(point)
            record.put("sweep", [point.to_json(workload) for point in points])
            best = max(points, key=lambda point: point.tokens_per_s(workload.gen_len))
            record.put("best", {**best.to_json(workload), "gen_len": workload.gen_len})
    except Exception as error:  # noqa: BLE001 - the best until then can still be measured longer
        traceback.print_exc()
        record.leave_out("rest of the sweep", f"{type(error).__name__}: {error}")
    if best is None:
        record.leave_out("best", "no batch size fits")
        record.finish()
        return
    room = side.gpu_memory_bytes - best.peak_bytes
    fitting = min(int(room // side.layer_bytes), side.spec.num_layers)
    for resident in range(fitting, -1, -1):
        step_s = best.step_s.median
        if setting.left_s() < 1.2 * (best.prefill_s + setting.scale.offload_steps * step_s):
            record.leave_out("best over more steps", "no time was left")
            break
        final = side.point(best.batch_size, best.cache, setting.scale.offload_steps, resident)
        if final is not None:
            record.put("best", {**final.to_json(workload), "gen_len": workload.gen_len})
            break
    record.finish()


def sweep(setting: Setting, record: Record, side: "OtherSide") -> Iterator[Point]:
    """Batches twice as large each, then the one between, until memory ends; no layer resident.

    A cache on the host starts where one on the GPU ended: before, it only costs.
    """
    size, least_s = setting.scale.first_batch, 0.0
    for cache in CACHES if side.device.type == "cuda" else CACHES[:1]:
        largest = 0
        while size <= setting.scale.last_batch:
            if setting.left_s() < 3 * least_s:  # the longer measurement at the end needs its time
                record.leave_out(f"{cache}, batch of {size}", "no time was left")
                return
            start_s = time.monotonic()
            point = side.point(size, cache, SWEEP_STEPS, 0)
            if point is None:
                between = (largest + size) // 2
                if largest and between not in {largest, size}:
                    last = side.point(between, cache, SWEEP_STEPS, 0)
                    if last is not None:
                        yield last
                break
            least_s = max(least_s, time.monotonic() - start_s)
            yield point
            largest, size = size, 2 * size


class OtherSide:
    """transformers' model of a shape with random weights, to be dispatched by accelerate."""

    def __init__(self, setting: Setting, spec: ModelSpec, profile: HardwareProfile, gpu_memory_bytes: int) -> None:
        start_s = time.monotonic()
        self.spec, self.workload = spec, setting.scale.workload
        self.gpu_memory_bytes = gpu_memory_bytes
        self.dtype: torch.dtype = getattr(torch, profile.default_dtype)
        self.device = torch.device("cpu" if setting.emulated else setting.accelerator)
        self.layer_bytes = spec.layer_bytes(FORMATS[profile.default_dtype])
        needed = spec.parameters * self.dtype.itemsize
        shared = needed > HOST_SHARE * available_ram_bytes()
        self.weights = "layers share one set of experts" if shared else "each layer has its own"
        self.model = _model(spec, self.dtype, shared=shared)
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(gpu_memory_bytes / total, self.device)
        self.build_s = time.monotonic() - start_s
        print(f"  {format_bytes(needed)} of weights made in {self.build_s:.0f} s", flush=True)

    def point(self, batch_size: int, cache: str, steps: int, resident: int) -> Point | None:
        """Measure a batch with so many layers on the GPU; None if there is too little memory."""
        pinned = self.pinned(batch_size, 1 + steps) if cache == "offloaded" else []
        if sum(pinned) > HOST_SHARE * (available := available_ram_bytes()):
            print(
                f"  batch of {batch_size}, cache {cache}: takes {format_bytes(sum(pinned))} of the "
                f"host, which has {format_bytes(available)}",
                flush=True,
            )
            return None
        prompts = torch.randint(
            self.spec.vocab_size,
            (batch_size, round(self.workload.prompt_len)),
            generator=torch.Generator().manual_seed(batch_size),
        )
        clock = TokenClock(self.device)
        try:
            self.dispatch(resident)
            if self.device.type == "cuda":
                # torch keeps them for the cache, so that no time is spent on pinning.
                _ = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in pinned]
                del _
                torch.cuda.reset_peak_memory_stats(self.device)
            with torch.inference_mode():
                clock.start()
                self.model.generate(
                    prompts.to(self.device),
                    attention_mask=torch.ones_like(prompts).to(self.device),
                    max_new_tokens=1 + steps,
                    do_sample=False,
                    pad_token_id=0,
                    cache_implementation=cache,
                    stopping_criteria=[clock],
                )
        except torch.OutOfMemoryError:
            return None
        except torch.AcceleratorError as error:  # what the driver says if it cannot pin so much
            if "out of memory" not in str(error):
                raise
            return None
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch._C._host_emptyCache()  # or pinned memory of other sizes stays the process's
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        point = Point(
            batch_size=batch_size,
            cache=cache,
            resident_layers=resident,
            prefill_s=clock.seconds[0],
            step_s=Spread.of(clock.seconds[1:]),
            peak_bytes=peak,
        )
        print(
            f"  batch of {batch_size}, cache {cache}, {resident} layers resident: prefill "
            f"{point.prefill_s:.3g} s, step {point.step_s.median:.3g} s, "
            f"{point.tokens_per_s(self.workload.gen_len):.4g} tokens/s",
            flush=True,
        )
        return point

    def pinned(self, batch_size: int, new_tokens: int) -> list[int]:
        """Bytes of all pieces of the host's memory that torch pins for an offloaded cache.

        Keys and values of a layer are a piece each, rounded up to a power of two, and there is one
        more of each while tokens are added.
        """
        tokens = batch_size * (round(self.workload.prompt_len) + new_tokens)
        num_bytes = tokens * self.spec.kv_size * self.dtype.itemsize
        return 2 * (self.spec.num_layers + 1) * [2 ** (num_bytes - 1).bit_length()]

    def dispatch(self, resident: int) -> None:
        """Have accelerate keep so many layers on the GPU with all that is no layer, not the rest.

        It takes a device that is none of the words "cpu" and "disk" for an accelerator.
        """
        from accelerate import dispatch_model
        from accelerate.hooks import remove_hook_from_submodules

        logging.getLogger("accelerate").setLevel(logging.ERROR)  # it tells what is asked for
        remove_hook_from_submodules(self.model)
        for layer in self.model.model.layers[resident:]:
            layer.to("cpu")  # one that was resident before would be offloaded from the GPU
        outside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        layers = {f"model.layers.{i}": self.device if i < resident else "cpu" for i in range(self.spec.num_layers)}
        device_map: dict[str, Any] = dict.fromkeys(outside, self.device) | layers
        dispatch_model(self.model, device_map, main_device=self.device, force_hooks=True)


@dataclass
class TokenClock:
    """A stopping criterion that never stops, and knows the seconds that each token took."""

    device: torch.device
    seconds: list[float] = field(default_factory=list[float])
    _last_s: float = 0.0

    def start(self) -> None:
        """Count from now."""
        self._last_s = time.perf_counter()

    def __call__(self, tokens: Tensor, scores: object, **others: object) -> Tensor:
        """Note the time that has passed since the last token."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now_s = time.perf_counter()
        self.seconds.append(now_s - self._last_s)
        self._last_s = now_s
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


def _model(spec: ModelSpec, dtype: torch.dtype, *, shared: bool) -> Any:
    """A Mixtral of that shape with random weights in the host's memory."""
    from accelerate import init_empty_weights
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        num_local_experts=spec.num_experts,
        num_experts_per_tok=spec.experts_per_token,
        sliding_window=None,
        eos_token_id=None,
        dtype=dtype,
    )
    with init_empty_weights(include_buffers=False):
        model: Any = MixtralForCausalLM(config)
    source, made = RandomWeights(seed=0), dict[str, nn.Parameter]()
    for name, parameter in list(model.named_parameters()):
        _, _, rest = name.partition(".experts.")
        key = f"experts.{rest}" if shared and rest else name
        if key not in made:
            memory = host_memory(parameter.numel() * dtype.itemsize).view(dtype)
            tensor = memory.view(parameter.shape)
            source.read_into(name, tensor.flatten(0, -2) if tensor.ndim > 1 else tensor)
            made[key] = nn.Parameter(tensor, requires_grad=False)
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner).register_parameter(last, made[key])
    model.generation_config.eos_token_id = None
    model.set_experts_implementation(EXPERTS)
    return model.eval()
