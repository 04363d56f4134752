"""Models in formats other than the dtype: as published, or as is asked."""

import json
from dataclasses import replace

import pytest

from hrm.analysis import formats_of
from hrm.costs import Costs, Runtime
from hrm.errors import ModelError
from hrm.estimate import estimate
from hrm.formats import FORMATS, Formats, packed_format
from hrm.layers import Unit
from hrm.model_spec import BUILT_IN_MODELS, What, packable, packed_as
from hrm.roofline import operator_seconds
from hrm.search import Space, search
from hrm.tasks import Device
from hrm.units import GB
from hrm.workload import WORKLOADS
from tests.hrm.support import machine, tiny_spec

pytestmark = pytest.mark.usefixtures("rough_bounds")

BFLOAT16 = FORMATS["bfloat16"]
SMALLER = ("fp8", "int8", "int4-g32", "mxfp4")  # each takes fewer bytes than those before it


def in_format(name, spec, what=What.EXPERTS):
    form = packed_format(name)
    assert form is not None
    return packed_as(spec, form, what)


@pytest.mark.parametrize(("name", "file_bytes"), [("gpt-oss-20b", 13_761_264_768), ("gpt-oss-120b", 65_248_815_744)])
def test_a_published_model_has_the_bytes_of_its_files(name, file_bytes):
    spec = BUILT_IN_MODELS[name]
    assert spec.bytes_in(BFLOAT16) == file_bytes  # as the index of its files on the Hub says
    assert spec.without_packing.bytes_in(BFLOAT16) == 2 * spec.parameters


def test_blocks_have_a_byte_a_weight_and_four_a_block():
    layer = BUILT_IN_MODELS["deepseek-v3"].layers[3]
    assert layer.expert_bytes(BFLOAT16) == 3 * (7168 * 2048 + 4 * 56 * 16)
    ranks = (1536, 7168), (128 * 192, 1536), (576, 7168), (7168, 128 * 128)
    shared = 3 * ((2048, 7168),)
    packed = sum(rows * width + 4 * -(-rows // 128) * (width // 128) for rows, width in (*ranks, *shared))
    plain = 256 * 7168 + 256 + 2 * 7168 + 1536 + 512 + 128 * 256 * 512
    assert layer.dense_bytes(BFLOAT16) == pytest.approx(packed + 2 * plain, rel=1e-5)


@pytest.mark.parametrize("name", BUILT_IN_MODELS)
def test_experts_are_packed_or_all_that_is_multiplied_by_hidden_states(name):
    spec = BUILT_IN_MODELS[name]
    experts, linear = (in_format("int8", spec, what) for what in What)
    for before, some, every in zip(spec.layers, experts.layers, linear.layers, strict=True):
        routed = {t.name for t in before.tensors if t.unit is Unit.EXPERT and len(t.shape) == 2}
        assert {pair[0] for pair in some.packed} == routed
        packed = {pair[0] for pair in every.packed}
        assert packed == {t.name for t in packable(before)} >= routed
        assert not packed & {"router", "shared_gate", *before.mixer.host_tensors}
    assert experts.packing == "experts in int8"
    assert experts.without_packing == linear.without_packing == spec.without_packing


def test_a_matrix_that_a_format_does_not_take_stays_plain():
    spec = BUILT_IN_MODELS["gpt-oss-20b"]
    assert in_format("fp8-b128", spec).packing == "experts (but w13) in fp8-b128"  # parts of 2880 rows
    odd = BUILT_IN_MODELS["olmoe-1b-7b"]
    experts = replace(odd.experts, intermediate_size=1023, hidden_size=odd.hidden_size)
    odd = odd.with_layers(replace(layer, ffn=(experts,)) for layer in odd.layers)
    assert in_format("int4-g32", odd).packing == "experts (but w2) in int4-g32"
    with pytest.raises(ModelError, match="format is 'int4': must be a format in which rows of the model's matrices"):
        in_format("int4", tiny_spec(hidden_size=33, intermediate_size=31))


def test_fewer_bytes_are_never_slower_where_weights_stream():
    spec, slow = BUILT_IN_MODELS["mixtral-8x7b"], machine(gpu_bytes=12 * GB, gpu_read=3e12, link=2e9)
    workload = replace(WORKLOADS["mtbench"], num_requests=64)
    policy = search(Space(spec, slow, workload, ffn=Device.GPU, attention=Device.CPU)).require().policy
    models = [spec, *(in_format(name, spec) for name in SMALLER)]
    sizes = [model.bytes_in(BFLOAT16) for model in models]
    rates = [estimate(model, policy, slow, workload).tokens_per_s for model in models]
    assert sizes == sorted(sizes, reverse=True)
    assert rates == sorted(rates)
    assert rates[-1] / rates[0] > 3


def test_gpt_oss_fits_a_card_of_24_gb_whole(hrm_json, refused):
    args = ["estimate", "--model", "gpt-oss-20b", "--gpus", "1xRTX-4090", "-u", "8", "-n", "1", "--kv-on-gpu"]
    args += ["--resident-experts", "32", "--prompt-len", "512", "--gen-len", "128"]
    assert hrm_json(*args)["policy"]["paper_tuple"]["r_w"] == 1
    assert "level gpu" in refused(*args, "--weight-format", "bfloat16")


def test_a_format_is_asked_for_by_name(hrm, hrm_json, refused):
    args = ["estimate", "--model", "mixtral-8x7b", "--gpus", "1xL40S", "-u", "8", "-n", "8"]
    auto, int4 = hrm_json(*args), hrm_json(*args, "--weight-format", "int4-g32")
    assert auto == hrm_json(*args, "--weight-format", "bfloat16")
    held = [plan["memory"]["cpu"]["planned_bytes"]["weights"] for plan in (auto, int4)]
    assert 3.3 < held[0] / held[1] < 3.6
    assert int4["predicted"]["lane_s"]["decode"]["H2D"] < 0.4 * auto["predicted"]["lane_s"]["decode"]["H2D"]
    assert "(46.7 B parameters, bfloat16, experts in int4-g32) on" in hrm(*args, "--weight-format", "int4-g32")[1]
    assert "--weight-format is 'int3': must be auto, float32" in refused(*args, "--weight-format", "int3")


WHAT_IF = ["whatif", "--formats", "--model", "olmoe-1b-7b", "--gpus", "1xT4", "--gpu-memory", "4GB", "--requests", "16"]
FORMATS_TEXT = """\
weights              KV cache  bytes    GPU      host     change  tokens/s  (N, μ, A_g, F_g, r_w, r_c)    limited by
float16              float16   13.8 GB  3.80 GB  12.2 GB  +0.0%   118.5     (16, 16, 1, 0, 0.108, 1.000)  host memory
experts in fp8       float16   7.41 GB  2.98 GB  5.84 GB  +62.8%  192.8     (16, 8, 1, 0, 0.203, 1.000)   GPU memory
experts in int8      float16   7.41 GB  2.98 GB  5.84 GB  +62.8%  192.8     (16, 8, 1, 0, 0.203, 1.000)   GPU memory
experts in int4-g32  float16   4.58 GB  2.13 GB  3.57 GB  +83.9%  217.8     (16, 8, 1, 0, 0.206, 1.000)   GPU memory
experts in mxfp4     float16   4.38 GB  2.06 GB  3.41 GB  +81.5%  215       (16, 8, 1, 0, 0.205, 1.000)   GPU memory
float16              fp8       13.8 GB  3.79 GB  12.0 GB  +0.7%   119.3     (16, 16, 1, 0, 0.126, 1.000)  host memory
float16              int8      13.8 GB  3.79 GB  12.0 GB  +0.7%   119.3     (16, 16, 1, 0, 0.126, 1.000)  host memory
"""


@pytest.mark.usefixtures("rough_bounds")
def test_formats_are_laid_side_by_side(hrm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    code, out, _ = hrm(*WHAT_IF)
    assert code == 0
    assert out.splitlines()[0].startswith("olmoe-1b-7b, float16, on 1xT4")
    assert "".join(f"{line.rstrip()}\n" for line in out.splitlines()[2:]) == FORMATS_TEXT


def test_the_plan_as_it_is_asked_comes_first_and_no_format_twice():
    space = Space(BUILT_IN_MODELS["gpt-oss-20b"], machine(), WORKLOADS["mtbench"], kv_format="int8")
    found = [(one.spec.packing, one.kv_format) for one in formats_of(space)]
    packed = ("", "experts in fp8", "experts in int8", "experts in int4-g32")
    assert found == [
        ("experts in mxfp4", "int8"),
        *((packing, "int8") for packing in packed),
        ("experts in mxfp4", "fp8"),
    ]


@pytest.mark.usefixtures("coarse_searches")
def test_what_fits_in_one_format_only_is_shown(hrm, refused):
    memory = ["--model", "olmoe-1b-7b", "--gpus", "1xT4", "--gpu-memory", "2GB", "--cpu-memory", "7GB"]
    rows = json.loads(hrm("whatif", "--formats", *memory, "--requests", "1", "--json")[1])["rows"]
    assert [row["reason"] == "" for row in rows] == [False, *4 * [True], *2 * [False]]
    assert all(row["change"] is None for row in rows)
    assert "--percent is '5.0': does not go with --formats" in refused(*WHAT_IF, "--percent", "5")
    assert "--plot is 'a.png': does not go with --formats" in refused(*WHAT_IF, "--plot", "a.png")


def test_gpus_write_packed_weights_out_unless_their_kernels_are_fused():
    spec, profile = in_format("int4-g32", BUILT_IN_MODELS["mixtral-8x7b"]), machine(launch_s=1e-5)
    costs = Costs(spec, profile, Formats.of("bfloat16"))
    fused = replace(costs, runtime=Runtime(fused_kernels=True))
    weights, kind = spec.expert_parameters, spec.expert_kind
    strips = 28 + 14  # of w13 and w2
    by_launches = 1e-5 * (8 * (strips * 5 - 2 + 11 + 1) + 17) - 1e-5
    written_out = costs.post_attention(4096, 8, kind) - fused.post_attention(4096, 8, kind)
    assert written_out == pytest.approx(8 * 12.5 * weights / 300e9 + by_launches, rel=0.02)
    assert costs.cpu_experts(16, 8) - fused.cpu_experts(16, 8) < 0.02 * written_out  # launches that fused kernels spare


def test_a_plan_that_writing_out_limits_says_so(hrm):
    args = ["estimate", "--model", "gpt-oss-20b", "--gpus", "1xL4", "-u", "64", "-n", "1", "--kv-on-gpu"]
    args += ["--resident-experts", "32", "--requests", "64"]
    told = "writes packed weights out as plain numbers before it multiplies by them"
    assert told in hrm(*args)[1]
    assert told not in hrm(*args, "--weight-format", "bfloat16", "--gpu-memory", "60GB")[1]


def test_packed_weights_multiply_at_their_own_rate_where_it_was_measured():
    """And at that of plain ones where it was not; what is not packed is as before."""
    spec, formats = in_format("int4-g32", tiny_spec()), Formats.of("bfloat16")
    level = machine().host
    plain = level.processor.compute_flops_per_s["bfloat16"]
    slow = plain.each(lambda figure: figure.times(1e-3))
    rates = {**level.processor.compute_flops_per_s, "int4": slow}
    known = replace(level, processor=replace(level.processor, compute_flops_per_s=rates))
    experts = spec.expert_kind.run_experts(formats, 64, spec.num_experts)
    assert [kernel.code for kernel in experts.kernels] == ["int4"]
    before, after = (operator_seconds(experts, each, "bfloat16") for each in (level, known))
    assert after > 10 * before
    assert operator_seconds(experts, known, "bfloat16") >= experts.flops / slow.at(64 * 2 / spec.num_experts)
    of_attention = spec.expert_kind.project(formats, 64)
    assert len({float(operator_seconds(of_attention, each, "bfloat16")) for each in (level, known)}) == 1
