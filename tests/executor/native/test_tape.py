"""What is played is what was recorded, with other numbers; what cannot be repeated is not recorded."""

import pytest
import torch

from executor import native
from executor.model import Router, Routing, Workspace, run_experts
from executor.model.layout import ExpertWeights
from executor.native.tape import Numbers, Tape, is_recording
from tests.executor.native.support import PATHS

REQUESTS, HEADS, DIM, EXPERTS = 5, 4, 16, 6
WIDTH = HEADS * DIM


class Layer:
    """Attention and experts of a few requests, all in places of its own."""

    def __init__(self, path):
        torch.manual_seed(0)
        self.kernels = native.Kernels(path)
        self.rows, self.out = torch.randn(REQUESTS, 3 * WIDTH), torch.zeros(REQUESTS, WIDTH)
        self.weight, self.norm = torch.randn(3 * WIDTH, WIDTH), torch.rand(WIDTH)
        self.hidden = torch.randn(REQUESTS, WIDTH)
        self.router = torch.randn(EXPERTS, WIDTH)
        self.frequencies = torch.rand(DIM // 2)
        self.cache = torch.zeros(REQUESTS * 20, 2, HEADS, DIM)
        self.experts = [(e, ExpertWeights(torch.randn(16, WIDTH), torch.randn(WIDTH, 8))) for e in range(EXPERTS)]
        self.workspace = Workspace(torch.empty(1 << 20, dtype=torch.uint8))

    def run(self, numbers):
        """One layer: each kernel's output is the next one's input."""
        kernels = self.kernels
        x = self.workspace.take(self.hidden.shape, torch.float32)
        kernels.rms_norm(self.hidden, self.norm, 1e-5, x)
        kernels.linear(x, self.weight, self.rows, add=False)
        kernels.rotate(self.rows, 2 * HEADS, numbers.positions_R, self.frequencies)
        kernels.append(self.cache.flatten(1), self.rows[:, WIDTH:], numbers.cache_rows_R)
        kernels.decode_attention(self.rows, self.cache, numbers.starts, numbers.lengths, self.out)
        self.route_and_run()

    def route_and_run(self):
        logits = self.hidden.new_empty(REQUESTS, EXPERTS)
        weights, chosen = torch.empty(REQUESTS, 2), torch.empty(REQUESTS, 2, dtype=torch.int64)
        self.kernels.linear(self.out, self.router, logits, add=False)
        routing = Routing(weights, chosen)
        self.kernels.choose_experts(logits, routing, Router())
        with native.using(self.kernels):
            counts = run_experts(self.out, routing, self.experts, self.hidden, self.workspace)
        self.workspace.reset()
        return counts


def numbers_at(step):
    """Those of the step in which each request has its step-th token."""
    starts = [20 * r for r in range(REQUESTS)]
    return Numbers(
        torch.full((REQUESTS,), step), torch.tensor(starts) + step, starts, [step + 1 for _ in range(REQUESTS)]
    )


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv("EXECUTOR_NATIVE_UP_TO", "1000")
    return request.param


def test_a_tape_does_what_the_calls_do(path):
    ours, theirs = Layer(path), Layer(path)
    with torch.no_grad():
        tape = Tape.record(lambda: ours.run(numbers_at(0)), numbers_at(0))
        assert tape is None  # the numbers of the calls are others, though equal
        theirs.run(numbers_at(0))
        now = numbers_at(1)
        tape = Tape.record(lambda: ours.run(now), now)
        theirs.run(numbers_at(1))
        assert tape is not None
        assert not is_recording()
        counted = []
        for step in range(2, 6):
            counted.append(tape.play(numbers_at(step)))
            theirs.run(numbers_at(step))
            assert torch.equal(ours.hidden, theirs.hidden)
            assert torch.equal(ours.cache, theirs.cache)
    assert all(sum(counts) == 2 * REQUESTS for counts in counted)
    assert len({tuple(counts) for counts in counted}) > 1


def test_what_experts_are_left_out_of_is_not_recorded(path, monkeypatch):
    layer, now = Layer(path), numbers_at(0)
    with torch.no_grad():
        assert Tape.record(layer.route_and_run, now) is not None
        monkeypatch.setattr("executor.model.experts.max_native_tokens", lambda *_, **__: REQUESTS - 1)
        assert Tape.record(layer.route_and_run, now) is None


def test_what_torch_computes_is_not_recorded(path):
    layer, now = Layer(path), numbers_at(0)

    def scaled():
        layer.run(now)
        layer.hidden[1:].view(-1).mul_(2)

    with torch.no_grad():
        assert Tape.record(scaled, now) is None
        assert Tape.record(lambda: layer.out[:, :1].unsqueeze(0), now) is not None


def test_numbers_made_of_others_are_not_recorded(path):
    """Attention to the last four tokens, at first all that there are."""
    layer, now = Layer(path), numbers_at(0)

    def attend(lengths):
        layer.kernels.decode_attention(layer.rows, layer.cache, now.starts, lengths, layer.out)

    with torch.no_grad():
        assert Tape.record(lambda: attend([min(length, 4) for length in now.lengths]), now) is None
        tape = Tape.record(lambda: attend(now.lengths), now)
        assert tape is not None
        with pytest.raises(IndexError):  # what is played is within bounds as well
            tape.play(Numbers(now.positions_R, now.cache_rows_R, now.starts, [21] * (REQUESTS - 1) + [30]))
        with pytest.raises(IndexError):
            tape.play(Numbers(now.positions_R, now.cache_rows_R, now.starts[1:], now.lengths[1:]))
