"""What goes wrong with one request costs that request alone: a line with its error, and no more."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from executor.guard import is_of_one_request
from executor.handlers import PrefillHandlers
from executor.job.tokenizer import TextTokenizer
from hrm.tasks import Phase
from tests.contracts.tasks import act
from tests.executor.runtime.jobs import PROMPTS, line, tokens_of
from tests.executor.tiny_models import poisoned_copy, transformers_greedy

LINES = [line(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture
def poisoned(folder, tmp_path):
    """A copy of the checkpoint in which a token's embedding is not a number, or infinite."""

    def make(token: int, value: float):
        return poisoned_copy(folder, tmp_path / f"poisoned-{token}", token, value)

    return make


def totals_of(tmp_path, outcome="completed") -> dict:
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["outcome"] == outcome
    return content["totals"]


def failed(item, word: str) -> bool:
    assert item["response"] is None
    assert item["error"]["code"] == "request_failed"
    return word in item["error"]["message"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("accelerator", ["cpu", "emulated"])
def test_prompt_without_finite_logits(run, folder, poisoned, tmp_path, value, accelerator):
    used = {token for prompt in PROMPTS for token in prompt}
    used |= {token for prompt in PROMPTS for token in transformers_greedy(folder, prompt, 5)}
    token = min(set(range(3, 97)) - used)
    bad = [line("bad", [5, token, 7]), line("bad, sampled", [token], temperature=1)]
    _, done = run([*LINES[:3], bad[0], *LINES[3:], bad[1]], "--accelerator", accelerator, model=poisoned(token, value))
    for index, prompt in enumerate(PROMPTS):
        assert tokens_of(done[f"r{index}"]) == transformers_greedy(folder, prompt, 5)
    assert failed(done["bad"], "logits of the request's token 1 ")
    assert failed(done["bad, sampled"], "finite")
    totals = totals_of(tmp_path)
    assert (totals["requests"], totals["failed_requests"]) == (10, 2)


def test_logits_that_are_lost_while_it_generates(run, folder, poisoned, tmp_path):
    wanted = [transformers_greedy(folder, prompt, 5) for prompt in PROMPTS]
    prompts = {token for prompt in PROMPTS for token in prompt}
    token = next(t for tokens in wanted for t in tokens[:-1] if t not in prompts and t != 2)
    _, done = run(LINES, model=poisoned(token, torch.nan))
    hit = [index for index, tokens in enumerate(wanted) if token in tokens[:-1]]
    for index, tokens in enumerate(wanted):
        if index in hit:
            place = tokens.index(token) + 2
            assert failed(done[f"r{index}"], f"logits of the request's token {place} ")
        else:
            assert tokens_of(done[f"r{index}"]) == tokens
    assert 0 < len(hit) < 10
    assert totals_of(tmp_path)["failed_requests"] == len(hit)


def test_job_in_which_every_request_fails_ends(run, poisoned, tmp_path):
    _, done = run([line(f"r{i}", [3]) for i in range(6)], model=poisoned(3, torch.nan), code=2)
    assert all(failed(item, "finite") for item in done.values())
    totals = totals_of(tmp_path, "failed")
    assert (totals["requests"], totals["failed_requests"]) == (0, 6)
    assert totals["generated_tokens"] == 0


def test_failed_requests_are_tried_again(run, folder, poisoned):
    bad = poisoned(3, torch.nan)
    _, before = run([*LINES[:2], line("bad", [3, 5])], model=bad)
    assert failed(before["bad"], "finite")
    _, after = run([*LINES[:2], line("bad", [4, 5])], "--resume", model=bad)
    assert tokens_of(after["bad"]) == transformers_greedy(folder, [4, 5], 5)
    assert {name: after[name] for name in ("r0", "r1")} == {n: before[n] for n in ("r0", "r1")}


class Panic(BaseException):
    """As libraries in Rust raise it."""


class Panicking:
    """The tokenizer of a checkpoint, which panics over one token."""

    def __init__(self, token: int, error: type[BaseException]) -> None:
        self._token, self._error = token, error
        words = {f"w{index}": index for index in range(97)}
        self._inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
        self._inner.pre_tokenizer = pre_tokenizers.Whitespace()

    def encode(self, text, **keywords):
        if self._token in map(int, text.replace("w", " ").split()):
            raise self._error("no such text")
        return self._inner.encode(text, **keywords)

    def decode(self, tokens):
        if self._token in tokens:
            raise self._error("no such text")
        return self._inner.decode(tokens)

    def __getattr__(self, name):
        return getattr(self._inner, name)


def use(monkeypatch, tokenizer):
    made = TextTokenizer(tokenizer)
    monkeypatch.setattr(TextTokenizer, "of_checkpoint", staticmethod(lambda _: made))


@pytest.mark.parametrize("stop", [{}, {"stop": "never"}], ids=["text", "stop text"])
@pytest.mark.parametrize("error", [Panic, OverflowError])
def test_text_that_cannot_be_made(run, folder, tmp_path, monkeypatch, stop, error):
    wanted = [transformers_greedy(folder, prompt, 5) for prompt in PROMPTS]
    prompted = {token for prompt in PROMPTS for token in prompt}
    token = next(t for tokens in wanted for t in tokens[1:4] if t not in {2, *prompted})
    use(monkeypatch, Panicking(token, error))
    _, done = run([line(f"r{i}", prompt, **stop) for i, prompt in enumerate(PROMPTS)])
    hit = [index for index, tokens in enumerate(wanted) if token in tokens]
    for index, tokens in enumerate(wanted):
        if index in hit:
            assert failed(done[f"r{index}"], f"{error.__name__}: no such text")
        else:
            assert tokens_of(done[f"r{index}"]) == tokens
    assert 0 < len(hit) < 10
    totals = totals_of(tmp_path)
    assert (totals["requests"], totals["failed_requests"]) == (10 - len(hit), len(hit))


def test_prompt_that_the_tokenizer_panics_over(run, folder, monkeypatch):
    use(monkeypatch, Panicking(7, Panic))
    _, done = run([line("bad", "w5 w7"), *LINES[:2], line("good", "w5")])
    assert "Panic: no such text" in done["bad"]["error"]["message"]
    assert done["bad"]["error"]["code"] == "invalid_request"
    for index in range(2):
        assert tokens_of(done[f"r{index}"]) == transformers_greedy(folder, PROMPTS[index], 5)
    assert done["good"]["response"]["body"]["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_ends_a_run_is_no_matter_of_one_request(error):
    assert not is_of_one_request(error())
    assert is_of_one_request(Panic())


def test_extreme_sampling_is_greedy_and_troubles_nobody(run, folder):
    extremes = [
        {"temperature": 1e-300},
        {"temperature": 5e-324, "top_p": 5e-324},
        {"temperature": 2, "top_p": 1e-300},
        {"temperature": 1e-30, "seed": -(2**70)},
    ]
    lines = [line(f"x{i}", PROMPTS[i], **body) for i, body in enumerate(extremes)]
    _, done = run([*lines, *LINES[4:]])
    for index, prompt in enumerate(PROMPTS):
        item = done[f"x{index}" if index < len(extremes) else f"r{index}"]
        assert tokens_of(item) == transformers_greedy(folder, prompt, 5)


def test_failure_of_the_device_still_ends_the_run(run, monkeypatch):
    by_act = PrefillHandlers.by_act

    def made(own):
        handlers = by_act(own)

        def fail(_) -> int:
            raise torch.OutOfMemoryError

        return {**handlers, act("SAMPLE", phase=Phase.PREFILL): fail}

    monkeypatch.setattr(PrefillHandlers, "by_act", made)
    captured, done = run(LINES, "--quiet", code=1)
    assert "OutOfMemoryError" in captured.err
    assert not done
