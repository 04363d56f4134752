"""Lines of a report: what was given, how sure a prediction is, what is waited for, what runs it."""

from pathlib import Path
from typing import Final

from hrm.cli.console import as_is
from hrm.contract.families import EXECUTED_FAMILIES
from hrm.contract.quantising import is_written
from hrm.formats import Formats
from hrm.hardware import HardwareProfile
from hrm.latency import Latency
from hrm.model_spec import ModelSpec
from hrm.model_spec.gguf import SUFFIX
from hrm.parallel import undivided_vector
from hrm.policy import Parallelism
from hrm.ranges import ASSUMED_SHARE, ThroughputRange
from hrm.scaling import given_resources
from hrm.units import format_number, format_seconds

RUN_FROM: Final = "bfloat16, float16 or float32"  # what checkpoints that are run may hold


def machine_text(profile: HardwareProfile) -> str:
    """A machine's name, with a word where nothing of it was measured."""
    return f"{profile.name} (catalog figures)" if profile.accelerator == "catalog" else profile.name


def formats_text(spec: ModelSpec, formats: Formats) -> str:
    """What is computed in, and what is stored otherwise: `bfloat16, experts in mxfp4, KV cache in fp8`."""
    dtype, weights, cached = formats.compute.name, formats.weights.name, formats.kv_cache.name
    told = [dtype, spec.packing]
    told += [f"{what} in {name}" for what, name in (("weights", weights), ("KV cache", cached)) if name != dtype]
    return ", ".join(filter(None, told))


def warning_text(profile: HardwareProfile) -> str:
    """What a measured profile warns of, as rich's markup; empty if nothing."""
    warnings = profile.environment.get("warnings")
    return f"[yellow]the profile warns:[/] {as_is(warnings)}" if warnings else ""


def given_text(profile: HardwareProfile) -> str:
    """What the user gave of the machine, on the command line; empty if nothing."""
    given = given_resources(profile).items()
    shown = ", ".join(f"{resource} {resource.show(value)}" for resource, value in given)
    return f"given on the command line: {shown}" if shown else ""


def range_text(ends: ThroughputRange) -> str:
    """Between which throughputs the truth may lie, and because of which figures."""
    causes: list[str] = []
    if ends.assumed or not ends.spread:
        named = f" ({_some(ends.assumed)})" if ends.assumed else ""
        causes.append(f"assumed figures are up to {ASSUMED_SHARE:.0%} off{named}")
    if ends.spread:
        causes.append(f"measured ones as far as they spread ({_some(ends.spread)})")
    low, high = map(format_number, (ends.low_tokens_per_s, ends.high_tokens_per_s))
    return f"between {low} and {high} tokens/s, if {' and '.join(causes)}"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join([*names[:3], *(["…"] if len(names) > 3 else [])])


def latency_text(latency: Latency) -> str:
    """What a request waits for."""
    mean, last = format_seconds(latency.mean_ttft_s), format_seconds(latency.last_ttft_s)
    average = "" if mean == last else f", {mean} on average"
    told = f"first tokens within {last} of the start of their batch{average}"
    if latency.tpot_s is None:
        return told
    return f"{told}; then a token every {format_seconds(latency.tpot_s)}"


def run_text(
    model: str,
    out: Path | None,
    *,
    spec: ModelSpec,
    stored: ModelSpec,
    profile: HardwareProfile,
    parallelism: Parallelism = Parallelism.TENSOR,
) -> str:
    """The command that runs the policy and what is missing for it, or why nothing runs it and what does.

    `model` is the model as it was given and `stored` with the formats that its weights are published in,
    and `out` the policy file that was written, if one was.
    """
    is_folder = Path(model).is_dir() or model.endswith(SUFFIX)
    if obstacle := _obstacle_to_run(spec, stored, profile, parallelism, has_weights=is_folder):
        return f"[dim]a prediction only: {obstacle}[/]"
    path = out if out is not None else Path("policy.json")
    hints: list[str] = [] if out is not None else ["adding --out policy.json here"]
    if stored.published_dtype and (stored.packing != spec.packing or not stored.packing):
        hints.append(f"converting the published weights ({as_is(stored.published_dtype)}) to {RUN_FROM}")
    if stored.packing != spec.packing and spec.packing:
        hints.append(_to_pack(spec))
    hint = f"   [dim](after {' and '.join(hints)})[/]" if hints else ""
    folder = as_is(model) if is_folder else "FOLDER-WITH-WEIGHTS"
    return f"run it:  executor run --model {folder} --policy {path} --input prompts.jsonl --output-dir run/{hint}"


def _obstacle_to_run(
    spec: ModelSpec, stored: ModelSpec, profile: HardwareProfile, parallelism: Parallelism, *, has_weights: bool
) -> str:
    """Why the executor does not run such a policy, and what to do instead; empty if it does."""
    if spec.family not in EXECUTED_FAMILIES:
        return f"executor run does not know the family {spec.family}; hrm models lists those that it runs"
    divided = profile.num_gpus > 1 and parallelism is Parallelism.TENSOR
    if divided and (whole := undivided_vector(spec, spec.of_rank(profile.num_gpus))):
        return (
            f"executor run cannot divide {spec.name}, whose {whole} needs all that ranks have; "
            "search with --parallelism pipeline"
        )
    if has_weights and stored.packing != spec.packing:
        told = stored.packing or "no matrix packed"
        return f"executor run reads weights as they are stored: {told}; plan so{_or_pack(spec, stored)}"
    if has_weights and spec.published_dtype and not spec.packing:
        return f"executor run reads no {as_is(spec.published_dtype)} weights; convert them to {RUN_FROM}"
    return ""


def _written(spec: ModelSpec) -> str:
    """The format in which `executor quantise` packs a model's matrices as a plan has them; empty if it does not."""
    tensors = (tensor for kind in spec.layer_kinds() for tensor in kind.tensors)
    names = {tensor.packed.name for tensor in tensors if tensor.packed}
    return min(names) if len(names) == 1 and all(map(is_written, names)) else ""


def _to_pack(spec: ModelSpec) -> str:
    """What has to be done to have weights packed as a plan has them."""
    if form := _written(spec):
        return f"executor quantise --format {form}"
    return f"finding weights with {spec.packing}, which executor quantise does not write"


def _or_pack(spec: ModelSpec, stored: ModelSpec) -> str:
    """The other way, if there is one, where weights are stored otherwise than a plan has them."""
    is_plain = not (stored.packing or stored.published_dtype)  # what is packed already is not packed anew
    return f", or pack them with {_to_pack(spec)}" if is_plain and _written(spec) else ""
