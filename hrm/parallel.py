"""Several GPUs of one machine: tensor parallelism inside every layer, or a pipeline of stages.

In tensor parallelism the GPUs act as one large GPU whose memory, bandwidth, compute and links add
up, at the price of two all-reduces a layer. In a pipeline, stage s holds every layer of its own
range, and as many batches are under way as there are stages, each in another stage. The machine is
then like so many equal parts, one GPU and a share of the host each, through which the batches go
in turn: in the time that a part takes for its layers, one batch moves on by one stage, so the
throughput of the whole is that of one part with its layers. Every part keeps its layers' KV caches
of all those batches. A pipeline needs no all-reduces, but every link moves whole layers for a batch
that is that many times smaller.
"""

from dataclasses import replace

from hrm.hardware import HardwareProfile
from hrm.machines import one_part
from hrm.model_spec import ModelSpec
from hrm.policy import Parallelism


def part_of(
    spec: ModelSpec, profile: HardwareProfile, parallelism: Parallelism
) -> tuple[ModelSpec, HardwareProfile]:
    """What is planned: model and machine whole, or one pipeline stage with its part of both."""
    if parallelism is Parallelism.TENSOR or profile.num_gpus == 1:
        return spec, profile
    return _longest_stage(spec, profile.num_gpus), one_part(profile)


def _longest_stage(spec: ModelSpec, num_stages: int) -> ModelSpec:
    """The stage that the others wait for: the most layers, all with experts, and the LM head."""
    layers = -(-spec.num_layers // num_stages)
    return replace(
        spec,
        name=f"{spec.name}, one of {num_stages} stages",
        num_layers=layers,
        num_dense_layers=0,
        dense_intermediate_size=0,
        attention_windows=spec.attention_windows[-layers:],
    )


def tensor_parallel_obstacle(spec: ModelSpec, num_gpus: int) -> str:
    """Why the model cannot be divided over so many GPUs within its layers; empty if it can."""
    if spec.num_heads % num_gpus:
        return f"its {spec.num_heads} heads cannot be divided by {num_gpus}"
    if spec.intermediate_size % num_gpus:
        return f"an expert's {spec.intermediate_size} inner units cannot be divided by {num_gpus}"
    return ""


def pipeline_obstacle(spec: ModelSpec, num_gpus: int) -> str:
    """Why the model cannot be divided into so many stages; empty if it can."""
    if spec.num_layers < num_gpus:
        return f"its {spec.num_layers} layers are fewer than {num_gpus} stages"
    return ""
