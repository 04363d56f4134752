"""Loading: every byte is read once, to where it stays, and nothing else is held meanwhile."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from executor.backends import make_backend
from executor.errors import CheckpointError
from executor.loading import Loading, Target, fill
from executor.safetensors_file import PART_BYTES, SafetensorsFile
from hrm.buffers import Needs, Purpose, bytes_by_purpose
from hrm.tasks import Device
from hrm.units import MIB
from tests.executor.runtime.support import architecture, generator, make_policy
from tests.executor.tiny_models import DBRX, save_tiny


@pytest.fixture
def read_bytes(monkeypatch):
    """The ranges that are read of each open file, header apart."""
    ranges: list[tuple[int, int, int]] = []
    preadv = os.preadv

    def counting(handle, buffers, start):
        count = preadv(handle, buffers, start)
        ranges.append((handle, start, start + count))
        return count

    monkeypatch.setattr(os, "preadv", counting)
    return ranges


@pytest.mark.parametrize("name", ["wide heads", "tied", DBRX])
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_byte_is_read_once(tmp_path, read_bytes, name, original, dtype):
    """Whether experts are stored one by one or together, transposed, or in another dtype."""
    save_tiny(name, tmp_path, save_original_format=original)
    stored = load_file(tmp_path / "model.safetensors")
    loading = Loading()
    with generator(tmp_path, make_policy(3, resident=2, dtype=dtype), loading=loading) as made:
        weights = made.memory.weights
        assert sum(end - start for _, start, end in read_bytes) == sum(tensor.nbytes for tensor in stored.values())
        ordered = sorted(read_bytes)
        assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(ordered))
        spec = made.arch.spec
        if spec.tied_embeddings:
            assert weights.head is not None
            assert torch.equal(weights.head.lm_head, weights.embedding)
        assert loading.done_bytes == loading.total_bytes >= spec.parameters * weights.embedding.itemsize


def test_what_stays_on_the_gpu_is_not_in_host_memory(tiny_folder):
    """As planned, and as it is allocated: an expert that becomes resident leaves the host."""
    spec = architecture(tiny_folder).spec
    expert_bytes = 4 * spec.expert_parameters
    held = []
    for resident in range(spec.num_experts + 1):
        policy = make_policy(spec.num_layers, resident=resident, resident_dense=True)
        backend = make_backend("cpu", None)
        allocated: dict[Device, list[int]] = {level: [] for level in Device}
        allocate = backend.allocate

        def counting(level, num_bytes, allocated=allocated, allocate=allocate):
            allocated[level].append(num_bytes)
            return allocate(level, num_bytes)

        backend.allocate = counting
        with generator(tiny_folder, policy, backend=backend):
            pass
        planned = bytes_by_purpose(Needs.of_policy(spec, policy).on_host())
        assert sum(allocated[Device.CPU]) == sum(planned.values())
        held.append(planned[Purpose.WEIGHTS])
    assert held[-1] == 4 * spec.embedding_parameters
    assert [a - b for a, b in pairwise(held)] == [spec.num_layers * expert_bytes] * spec.num_experts


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to tell the peak")
@pytest.mark.parametrize(("dtype", "transposed"), [("bfloat16", False), ("float32", False), ("bfloat16", True)])
def test_nothing_is_held_beside_what_is_loaded(tmp_path, dtype, transposed):
    """Not a mapped file, nor a copy in the stored dtype."""
    rows, width = 64 * MIB // 2048, 1024
    header = {"a": {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, 2 * rows * width]}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as sparse:
        sparse.truncate(8 + len(text) + 2 * rows * width)
    of = getattr(torch, dtype)
    out = torch.ones(width, rows, dtype=of).T if transposed else torch.ones(rows, width, dtype=of)
    file = SafetensorsFile(path)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is now's
    before = memory_bytes("VmHWM")
    file.read_into("a", out, 0)
    peak = memory_bytes("VmHWM")
    file.close()
    assert not out.any()
    assert peak - before < PART_BYTES + 8 * MIB < out.nbytes


def memory_bytes(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


def test_what_goes_wrong_in_a_reader_is_told(tiny_folders, monkeypatch):
    folder = tiny_folders["wide heads"]
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda handle, buffers, start: preadv(handle, buffers, start) if start < 9999 else 0
    )
    with pytest.raises(CheckpointError, match="must not change while it is read"), generator(folder, make_policy(3)):
        pass


def test_the_first_failure_ends_all(tiny_folders):
    places = [Target((), torch.empty(1)) for _ in range(1000)]
    seen = []

    def read(place):
        seen.append(place)
        if len(seen) >= 10:
            raise OSError(5, "broken")

    loading = Loading()
    with pytest.raises(OSError, match="broken"):
        fill(places, read, loading)
    assert len(seen) < 20
    assert loading.done_bytes < loading.total_bytes
