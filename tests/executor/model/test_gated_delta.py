"""The gated delta rule against transformers' layer, by parts of prompts and by steps."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from executor import native
from executor.kv_cache import cache_rows
from executor.model import CpuKernels, GatedDelta, GpuKernels, Norm, PromptNumbers, RowNumbers, Workspace
from executor.model.layout import GatedDeltaWeights
from hrm.formats import FORMATS, Formats
from hrm.layers import GatedDeltaNet, Layer
from hrm.model_spec.workspace import workspace_bytes
from tests.executor.model.test_gpu_memory import LiveBytes
from tests.executor.model.test_stored import EXPERTS, randomised, spec_of
from tests.executor.runtime.support import make_policy

D, EPS, PLENTY = 16, 1e-6, 1 << 24
LENGTHS = (150, 64, 3, 1)  # blocks of 64 and a part of one, one alone, fewer tokens than are convolved


@dataclass
class Case:
    """A layer of ours and of theirs, and their outputs of each prompt, all tokens at once."""

    block: GatedDeltaNet
    weights: GatedDeltaWeights
    inputs: list[Tensor]
    outputs: list[Tensor]
    steps: list[Tensor]  # outputs of the tokens after, one by one

    @property
    def mixer(self) -> GatedDelta:
        return GatedDelta(block=self.block, norm=Norm(eps=EPS), output_norm=Norm(eps=EPS))

    def states(self, count: int, dtype: str = "float32") -> Tensor:
        layer = Layer(mixer=self.block, ffn=(EXPERTS,))
        policy = make_policy(1, dtype=dtype)
        return cache_rows(
            layer, policy, torch.zeros(count * self.block.state_bytes(Formats.of(dtype)), dtype=torch.uint8)
        )


@pytest.fixture(scope="module", params=[(2, 4, 6, 10, 4), (3, 3, 8, 4, 2)], ids=["grouped", "one to one"])
def case(request) -> Case:
    keys, values, key_dim, value_dim, kernel = request.param
    config = Qwen3NextConfig(
        hidden_size=D,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=EPS,
        linear_num_key_heads=keys,
        linear_num_value_heads=values,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=kernel,
    )
    theirs = randomised(Qwen3NextGatedDeltaNet(config, 0)).requires_grad_(False)
    block = GatedDeltaNet(
        hidden_size=D,
        num_key_heads=keys,
        num_value_heads=values,
        key_head_dim=key_dim,
        value_head_dim=value_dim,
        conv_kernel=kernel,
    )
    norm = torch.rand(D) + 0.5
    with torch.inference_mode():
        x = torch.eye(D).unsqueeze(0)
        parts = theirs.fix_query_key_value_ordering(theirs.in_proj_qkvz(x), theirs.in_proj_ba(x))
        q, k, v, z, b, a = (part.flatten(2)[0].T for part in parts)
        weights = GatedDeltaWeights(
            norm,
            torch.cat([q, k, v, z, a, b]),
            theirs.conv1d.weight[:, 0],
            theirs.A_log,
            theirs.dt_bias,
            theirs.norm.weight,
            theirs.out_proj.weight,
        )
        inputs, outputs, steps = [], [], []
        for length in LENGTHS:
            x_TD = torch.randn(length + 2, D)
            normed = torch.nn.functional.rms_norm(x_TD, (D,), norm, EPS).unsqueeze(0)
            cache = DynamicCache(config=config)
            inputs.append(x_TD)
            outputs.append(x_TD[:length] + theirs(normed[:, :length], cache_params=cache)[0])
            after = [theirs(normed[:, t : t + 1], cache_params=cache)[0] for t in (length, length + 1)]
            steps.append(x_TD[length:] + torch.cat(after))
    return Case(block, weights, inputs, outputs, steps)


def workspace():
    return Workspace(torch.empty(PLENTY, dtype=torch.uint8))


def prefill(case, x_TD, lengths, states):
    """What the layer makes of parts of prompts that lie one after the other."""
    mixer, hidden_TD = case.mixer, x_TD.clone()
    row_TX = torch.full((len(x_TD), case.block.sent_elements), torch.nan, dtype=x_TD.dtype)
    held_TS = torch.full((len(x_TD), case.block.held_elements), torch.nan, dtype=x_TD.dtype)
    out_TO = torch.full((len(x_TD), case.block.returned_elements), torch.nan, dtype=x_TD.dtype)
    numbers = PromptNumbers.write(torch.empty(4 * len(x_TD), dtype=torch.int64), [0] * len(lengths), lengths)
    mixer.project(hidden_TD, case.weights, numbers.positions_T, row_TX, held_TS, workspace())
    mixer.prefill(CpuKernels(), row_TX, case.weights, numbers, states, out_TO, workspace())
    mixer.finish(out_TO, held_TS, case.weights, hidden_TD, workspace())
    return hidden_TD


def step(case, kernels, x_RD, cache_C, rows, *, spare_bytes=PLENTY):
    """What it makes of a new token of each request."""
    mixer, hidden_RD = case.mixer, x_RD.clone()
    row_RX, held_RS, out_RO = (
        torch.full((len(x_RD), width), torch.nan)
        for width in (case.block.sent_elements, case.block.held_elements, case.block.returned_elements)
    )
    numbers = RowNumbers(torch.zeros(len(rows)), torch.tensor(rows), rows, [1] * len(rows))
    mixer.project(hidden_RD, case.weights, numbers.positions_R, row_RX, held_RS, workspace())
    mixer.append(cache_C, row_RX, numbers.cache_rows_R)
    mixer.decode(kernels, row_RX, case.weights, cache_C, numbers, out_RO, spare_bytes=spare_bytes)
    mixer.finish(out_RO, held_RS, case.weights, hidden_RD, workspace())
    return hidden_RD


def test_prompts_one_after_the_other(case):
    states = case.states(len(LENGTHS))
    x_TD = torch.cat([x[:length] for x, length in zip(case.inputs, LENGTHS, strict=True)])
    ours = prefill(case, x_TD, LENGTHS, states.split(1))
    torch.testing.assert_close(ours, torch.cat(case.outputs), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("part", [1, 2, 63, 64, 65])
def test_parts_go_on_from_the_state_that_the_one_before_left(case, part):
    states, length = case.states(1), LENGTHS[0]
    parts = case.inputs[0][:length].split(part)
    ours = torch.cat([prefill(case, x, [len(x)], [states]) for x in parts])
    torch.testing.assert_close(ours, case.outputs[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("how", ["native", "torch", "torch, one by one", "gpu"])
def test_steps_after_prompts_leave_other_states_alone(case, how):
    """Requests in rows with gaps: states that no one steps, of requests that have ended, stay as they are."""
    rows, cache = [1, 2, 4, 7], case.states(9)
    cache.view(torch.float32).fill_(3)
    before = cache.clone()
    for row, x, length in zip(rows, case.inputs, LENGTHS, strict=True):
        cache[row].zero_()
        prefill(case, x[:length], [length], [cache[row : row + 1]])
    kernels = GpuKernels() if how == "gpu" else CpuKernels()
    spare_bytes = 0 if how == "torch, one by one" else PLENTY
    with native.using(native.kernels() if how == "native" else None):
        for t in range(2):
            x_RD = torch.stack([x[length + t] for x, length in zip(case.inputs, LENGTHS, strict=True)])
            ours = step(case, kernels, x_RD, cache, rows, spare_bytes=spare_bytes)
            theirs = torch.stack([steps[t] for steps in case.steps])
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)
    others = [row for row in range(9) if row not in rows]
    assert torch.equal(cache[others], before[others])


def test_bfloat16_is_near(case):
    states = case.states(1, "bfloat16")
    low = Case(
        case.block,
        GatedDeltaWeights(*(getattr(case.weights, name).bfloat16() for name in case.weights.__slots__)),
        case.inputs,
        case.outputs,
        case.steps,
    )
    ours = prefill(low, case.inputs[0][: LENGTHS[0]].bfloat16(), LENGTHS[:1], [states]).float()
    error = (ours - case.outputs[0]).norm() / (case.outputs[0] - case.inputs[0][: LENGTHS[0]]).norm()
    assert error < 0.03


@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_prefill_takes_no_more_than_is_planned(case, tokens):
    """On a device, where all that operators allocate counts, and from an arena."""
    spec = spec_of(Layer(mixer=case.block, ffn=(EXPERTS,)))
    planned = int(workspace_bytes(spec, tokens, FORMATS["float32"]))
    row_TX, held_TS = torch.randn(tokens, case.block.sent_elements), torch.randn(tokens, case.block.held_elements)
    out_TO, hidden_TD = torch.empty(tokens, case.block.returned_elements), torch.randn(tokens, D)
    kept = 4 * tokens * case.block.kept_elements
    numbers = PromptNumbers.write(torch.empty(2 * tokens, dtype=torch.int64), [0], [tokens])
    states, arena = case.states(1), Workspace(torch.empty(planned - kept, dtype=torch.uint8))
    of_torch = Workspace(torch.empty(0, dtype=torch.uint8), of_torch=planned)
    for memory in (arena, of_torch):
        with native.using(None), torch.no_grad(), LiveBytes() as live:
            case.mixer.prefill(GpuKernels(), row_TX, case.weights, numbers, [states], out_TO, memory)
            case.mixer.finish(out_TO, held_TS, case.weights, hidden_TD, memory)
    assert live.peak_bytes + kept <= planned
    assert arena.high_water_bytes >= 0.5 * live.peak_bytes
