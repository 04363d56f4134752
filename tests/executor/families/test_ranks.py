"""What ranks in tensor parallel read of a checkpoint: together the model, each byte of what they divide once.

Blocks are computed with the weights of each rank, and their sum is what the whole model's weights give.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from executor import safetensors_file
from executor.checkpoint import Checkpoint, WeightSource
from executor.families import FAMILIES, Family, family_for
from executor.families.base import RankPart
from executor.model import Architecture, CpuKernels, PromptNumbers, Workspace, dense_views
from executor.model.layout import Tensors, dense_tensors, expert_tensors, num_elements, views
from executor.model.mixers import Mixer
from executor.random_weights import RandomWeights
from executor.safetensors_file import TensorFile
from hrm.errors import ModelError
from hrm.formats import packed_format
from hrm.layers import ExpertDivision, Layer, Unit
from hrm.model_spec import spec_from_hf_config
from hrm.model_spec.stored_formats import What, packed_as
from hrm.parallel import tensor_parallel_obstacle
from tests.executor.families.latent import SIZES as LATENT_SIZES
from tests.executor.families.linear import DELTA
from tests.executor.families.linear import EXPERTS as NEXT_EXPERTS
from tests.executor.families.test_gguf import CASES as GGUF
from tests.executor.families.test_gguf import write as write_gguf
from tests.executor.families.test_parity import FAMILIES_UNDER_TEST, STORED_OTHERWISE
from tests.executor.families.test_quantised import CASES, METHODS, packed
from tests.executor.families.tiny import SIZES, WEIGHTS, causal, save
from tests.executor.reference import dequantised
from tests.executor.runtime.device_tensor import DeviceTensor
from tests.executor.tiny_models import DBRX, save_tiny

INNER: Final = ExpertDivision.INNER
TOKENS: Final = 9
ROOM: Final = 10**7


@dataclass(frozen=True)
class Weights:
    """All weights of a model, or of one of its ranks, as numbers, by the place that they are in."""

    layers: list[tuple[dict[str, Any], list[dict[str, Tensor]]]]
    dense: list[Tensor]
    outside: dict[str, Tensor]


def load(family: Family, source: WeightSource, arch: Architecture, part: RankPart | None = None) -> Weights:
    """Those of the model, or of a rank; every element of the memory that is planned for them is written."""
    spec = arch.spec if part is None else part.spec

    def read(tensors: Tensors, *place: int) -> Tensor:
        flat = torch.full((num_elements(tensors, torch.float32),), torch.nan)
        family.load(source, arch.spec, tensors, flat, *place, part=part)
        return flat

    def numbers(tensors: Tensors, flat: Tensor) -> dict[str, Tensor]:
        made = {name: dequantised(matrix) for name, matrix in views(tensors, flat).items()}
        assert not any(tensor.isnan().any() for tensor in made.values()), [*made]
        return made

    dense = [read(dense_tensors(layer), index) for index, layer in enumerate(spec.layers)]
    layers = [
        (
            numbers(dense_tensors(layer), flat),
            [numbers(expert_tensors(layer), read(expert_tensors(layer), index, e)) for e in range(layer.num_experts)],
        )
        for index, (layer, flat) in enumerate(zip(spec.layers, dense, strict=True))
    ]
    outside = [numbers(tensors, read(tensors)) for tensors in (spec.embedding_tensors, spec.head_tensors)]
    return Weights(layers, dense, {**outside[0], **outside[1]})


def ffn(x_TD: Tensor, weights: dict[str, Tensor], name: str = "") -> Tensor:
    """An FFN with its biases; whatever its activation is, it is of every inner unit by itself."""
    matrices = {key: tensor.double() for key, tensor in weights.items()}
    gate_up = functional.linear(x_TD, matrices[f"{name}w13"], matrices.get(f"{name}w13_bias"))
    gate, up = gate_up.chunk(2, dim=1)
    return functional.linear(functional.silu(gate) * up, matrices[f"{name}w2"], matrices.get(f"{name}w2_bias"))


def ffns(x_TD: Tensor, dense: dict[str, Tensor], experts: list[dict[str, Tensor]]) -> Iterator[Tensor]:
    """The outputs of all FFNs of a layer."""
    yield from (ffn(x_TD, dense, name) for name in ("dense_", "shared_") if f"{name}w13" in dense)
    yield from (ffn(x_TD, expert) for expert in experts)


def mixed(mixer: Mixer, layer: Layer, flat: Tensor, x_TD: Tensor) -> Tensor:
    """What attention over one prompt adds to hidden states, before any norm of it."""
    block, workspace = mixer.block, Workspace(torch.empty(ROOM, dtype=torch.uint8))
    weights = dense_views(layer, flat).mixer
    if hasattr(weights, "attention_output_norm"):
        weights = replace(weights, attention_output_norm=None)
    row, held, out = (
        torch.empty(len(x_TD), size) for size in (block.sent_elements, block.held_elements, block.returned_elements)
    )
    numbers = PromptNumbers.write(torch.empty(4 * TOKENS, dtype=torch.int64), [0], [len(x_TD)])
    state = torch.zeros(1, 10**5, dtype=torch.uint8) if mixer.has_state else None
    mixer.project(x_TD, weights, numbers.positions_T, row, held, workspace)
    mixer.prefill(CpuKernels(), row, weights, numbers, [state], out, workspace)
    added = torch.zeros_like(x_TD)
    mixer.finish(out, held, weights, added, workspace)
    return added


def of_ranks(
    family: Family, source: WeightSource, arch: Architecture, ranks: int, division: ExpertDivision = INNER
) -> list[Weights]:
    spec = arch.spec.of_rank(ranks, division)
    return [load(family, source, arch, RankPart(spec, rank)) for rank in range(ranks)]


def assert_the_same_model(family: Family, source: WeightSource, arch: Architecture, ranks: int) -> None:
    """Of every block the ranks' outputs sum up to the model's, and vocabularies follow one another."""
    assert not tensor_parallel_obstacle(arch.spec, ranks)
    torch.manual_seed(0)
    whole, parts = load(family, source, arch), of_ranks(family, source, arch, ranks)
    narrow, x_TD = arch.spec.of_rank(ranks), torch.randn(TOKENS, arch.spec.hidden_size)
    for index, layer in enumerate(arch.spec.layers):
        theirs = zip(*(ffns(x_TD.double(), *part.layers[index]) for part in parts), strict=True)
        for ours, each in zip(ffns(x_TD.double(), *whole.layers[index]), theirs, strict=True):
            torch.testing.assert_close(sum(each), ours, rtol=1e-9, atol=1e-9)
        mixer = arch.layers[index].mixer
        expected = mixed(mixer, layer, whole.dense[index], x_TD)
        of_rank = replace(mixer, block=narrow.layers[index].mixer)
        added = [mixed(of_rank, narrow.layers[index], part.dense[index], x_TD) for part in parts]
        torch.testing.assert_close(sum(added), expected, rtol=1e-4, atol=1e-4)
        assert_undivided_alike(whole, parts, index)
    for name in ("embedding", "lm_head", "lm_head_bias"):
        if name in whole.outside:
            rows = torch.cat([part.outside[name] for part in parts])
            assert rows[: arch.spec.vocab_size].equal(whole.outside[name])
            assert not rows[arch.spec.vocab_size :].any()
    assert all(part.outside["final_norm"].equal(whole.outside["final_norm"]) for part in parts)


def assert_whole_experts_are_the_models(family: Family, source: WeightSource, arch: Architecture, ranks: int) -> None:
    """One rank's after the other's, bit by bit with all that is of an expert; all else is as where they are divided."""
    if tensor_parallel_obstacle(arch.spec, ranks, ExpertDivision.WHOLE):
        return
    torch.manual_seed(0)
    whole = load(family, source, arch)
    parts, divided = (of_ranks(family, source, arch, ranks, division) for division in (ExpertDivision.WHOLE, INNER))
    for index, (_, experts) in enumerate(whole.layers):
        theirs = [expert for part in parts for expert in part.layers[index][1]]
        assert len(theirs) == len(experts)
        for ours, each in zip(experts, theirs, strict=True):
            assert ours.keys() == each.keys()
            assert all(each[name].equal(tensor) for name, tensor in ours.items())
        for part, other in zip(parts, divided, strict=True):
            dense, same = part.layers[index][0], other.layers[index][0]
            assert dense.keys() == same.keys()
            assert all(dense[name].equal(tensor) for name, tensor in same.items())


def assert_undivided_alike(whole: Weights, parts: list[Weights], layer: int) -> None:
    names = {"attention_norm", "ffn_norm", "router", "score_correction", "kv_down", "query_down", "router_bias"}
    ours = whole.layers[layer][0]
    for name in names & ours.keys():
        assert all(part.layers[layer][0][name].equal(ours[name]) for part in parts), name


def opened(folder: Path) -> tuple[Family, Checkpoint, Architecture]:
    checkpoint = Checkpoint.open(folder)
    family = family_for(checkpoint.config, checkpoint.config_path)
    arch = family.architecture(checkpoint.config, checkpoint.config_path)
    checkpoint.check(family.expected_tensors(arch, checkpoint.names))
    return family, checkpoint, arch


QWEN_SIZES: Final[dict[str, Any]] = {
    "num_hidden_layers": 2,
    "norm_topk_prob": True,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "intermediate_size": 32,
    "head_dim": 16,
}
NORMED_TOGETHER: Final = ("olmoe", "minimax_m2")  # heads, so that ranks would have to sum up for their norms


@pytest.mark.parametrize("name", FAMILIES_UNDER_TEST)
def test_outputs_of_ranks_sum_up_to_the_models(tmp_path: Path, name: str) -> None:
    tiny = save(FAMILIES_UNDER_TEST[name], tmp_path, STORED_OTHERWISE.get(name))
    family, checkpoint, arch = opened(tiny.folder)
    with checkpoint:
        divides = [ranks for ranks in (2, 4) if not tensor_parallel_obstacle(arch.spec, ranks)]
        assert divides
        if name in NORMED_TOGETHER:
            with pytest.raises(ModelError, match="query_norm is <of 2 ranks>"):
                arch.of_rank(0, arch.spec.of_rank(2))
            return
        for ranks in divides:
            assert_the_same_model(family, checkpoint, arch, ranks)
            assert_whole_experts_are_the_models(family, checkpoint, arch, ranks)


# Experts of three groups, so that the first of two ranks has two of them, and the second a third and noughts.
THREE_GROUPS: Final = causal("qwen3_moe", **{**QWEN_SIZES, "moe_intermediate_size": 96}, hidden_size=64)
PACKED: Final = {
    **{name: CASES[name] for name in ("gpt-oss in mxfp4", "deepseek in fp8")},
    **{f"qwen in {name}": replace(CASES[f"qwen in {name}"], make=THREE_GROUPS) for name in METHODS},
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_experts_stay_packed_and_sum_up(tmp_path: Path, name: str) -> None:
    family, checkpoint, arch = opened(packed(PACKED[name], tmp_path / "model").folder)
    kept = {"w13"} if name == "qwen in gptq in order" else {"w13", "w2"}  # columns in an order of their own are not
    with checkpoint:
        assert_the_same_model(family, checkpoint, arch, 2)
        assert_whole_experts_are_the_models(family, checkpoint, arch, 2)
        for layer in arch.spec.of_rank(2).layers:
            assert not layer.num_experts or kept <= dict(layer.packed).keys()


@pytest.mark.parametrize("name", PACKED)
def test_a_rank_on_a_device_has_the_same_weights(tmp_path: Path, name: str) -> None:
    """The device's tensors are as strict as CUDA's, which are not computed with beside those of the host."""
    family, checkpoint, arch = opened(packed(PACKED[name], tmp_path / "model").folder)
    spec = arch.spec.of_rank(2)
    layer = spec.layers[-1]
    with checkpoint:
        for tensors, *place in ((dense_tensors(layer), len(spec.layers) - 1), (expert_tensors(layer), 1, 2)):
            here = torch.zeros(num_elements(tensors, torch.bfloat16), dtype=torch.bfloat16)
            there = DeviceTensor(here.clone())
            for flat in (here, there):
                family.load(checkpoint, arch.spec, tensors, flat, *place, part=RankPart(spec, 1))
            assert there.inner.view(torch.int16).equal(here.view(torch.int16))


@pytest.mark.parametrize("name", GGUF)
def test_gguf_files_are_divided(tmp_path: Path, name: str) -> None:
    architecture, make, kinds = GGUF[name]
    saved = save(make, tmp_path)
    write_gguf(tmp_path / "model.gguf", architecture, load_file(tmp_path / WEIGHTS), saved.model.config, kinds)
    family, checkpoint, arch = opened(tmp_path / "model.gguf")
    with checkpoint:
        assert_the_same_model(family, checkpoint, arch, 2)
        assert_whole_experts_are_the_models(family, checkpoint, arch, 2)


WIDE: Final = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96, "num_hidden_layers": 2}
RANDOM: Final[dict[str, dict[str, Any]]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**LATENT_SIZES, "moe_intermediate_size": 96, "n_routed_experts": 16},
    "qwen3_next": {**NEXT_EXPERTS, **DELTA, "moe_intermediate_size": 96, "full_attention_interval": 2, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 7},
}


@pytest.mark.parametrize(
    ("family", "form"),
    [
        (family, form)
        for family in RANDOM
        for form in ("", "int4-g8", "mxfp4", "fp8-b16", "nvfp4")
        if (family, form) != ("gpt_oss", "fp8-b16")  # whose rows lie gate by gate
    ],
)
def test_random_weights_are_the_same_model(family: str, form: str) -> None:
    spec = spec_from_hf_config({"model_type": family, **WIDE, **RANDOM[family]}, family)
    packing = packed_format(form)
    spec = spec if packing is None else packed_as(spec, packing, What.LINEAR)
    arch = FAMILIES[family].published_architecture(spec)
    assert_the_same_model(FAMILIES[family], RandomWeights(5), arch, 2)


@pytest.mark.parametrize("least", [0, 10**6])
@pytest.mark.parametrize("name", [DBRX, "wide heads"])
def test_ranks_read_each_byte_of_what_they_divide_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, least: int
) -> None:
    """And of rows that lie near one another what is between them as well."""
    family, checkpoint, arch = opened(save_tiny(name, tmp_path))
    count, fill = 0, TensorFile._fill

    def counted(self: TensorFile, left: memoryview, start: int) -> None:
        nonlocal count
        count += len(left)
        fill(self, left, start)

    monkeypatch.setattr(TensorFile, "_fill", counted)
    monkeypatch.setattr(safetensors_file, "LEAST_GAP_BYTES", least)
    with checkpoint:
        load(family, checkpoint, arch)
        of_whole, count = count, 0
        of_ranks(family, checkpoint, arch, 2)
    assert of_whole == 4 * arch.spec.parameters
    split: dict[int | None, int] = {None: arch.spec.hidden_size, 0: 0, 1: 0}  # the last norm is of no layer
    for layer in arch.spec.layers:
        for tensor in layer.tensors:
            times = layer.num_experts if tensor.unit is Unit.EXPERT else 1
            split[tensor.split] += times * tensor.parameters
    twice, others = 4 * split[None], 4 * split[1]
    if least == 0:
        assert count == of_whole + twice
    else:
        assert of_whole + twice < count <= of_whole + twice + others


@pytest.mark.parametrize("name", [DBRX, "wide heads"])
def test_a_rank_reads_its_own_whole_experts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whether they are stored one by one or together."""
    family, checkpoint, arch = opened(save_tiny(name, tmp_path))
    counts, fill = [0], TensorFile._fill

    def counted(self: TensorFile, left: memoryview, start: int) -> None:
        counts[-1] += len(left)
        fill(self, left, start)

    monkeypatch.setattr(TensorFile, "_fill", counted)
    spec = arch.spec.of_rank(2, ExpertDivision.WHOLE)
    with checkpoint:
        for rank in range(2):
            for index, layer in enumerate(spec.layers):
                flat = torch.empty(num_elements(expert_tensors(layer), torch.float32))
                for expert in range(layer.num_experts):
                    family.load(
                        checkpoint, arch.spec, expert_tensors(layer), flat, index, expert, part=RankPart(spec, rank)
                    )
            counts.append(0)
    of_experts = 4 * arch.spec.num_experts * arch.spec.expert_parameters * arch.spec.num_expert_layers
    assert counts == [of_experts // 2, of_experts // 2, 0]
