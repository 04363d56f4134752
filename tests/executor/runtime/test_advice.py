"""An input that asks for more than the policy was solved for is told the search that is for it."""

import json
import shlex
from contextlib import suppress

import pytest

from executor.batching import Request, asks_for_more
from executor.job.advice import too_long_together
from executor.job.survey import RequestLengths
from executor.sampling import SamplingParams
from hrm.cli import main as hrm_main
from hrm.policy_file import load_policy_file
from hrm.workload import Workload
from tests.executor.runtime.jobs import PROMPTS, exit_code, line, outputs, run_words, tokens_of
from tests.executor.runtime.support import make_policy
from tests.executor.tiny_models import transformers_greedy

SOLVED = Workload(name="test", prompt_len=20, max_prompt_len=40, gen_len=5)
POLICY = make_policy(1, batch_size=4, micro_batch_size=2, kv_tokens_per_micro_batch=96)  # 48 each


@pytest.mark.parametrize(
    ("prompt", "new", "more"),
    [(40, 5, False), (41, 1, True), (43, 5, True), (40, 9, True), (10, 38, False), (10, 39, True)],
)
def test_which_request_asks_for_more(prompt, new, more):
    request = Request("r", (3,) * prompt, SamplingParams(max_tokens=new))
    assert asks_for_more(request, SOLVED, POLICY) is more


@pytest.mark.parametrize(
    ("requests", "prompt", "new", "too_long"),
    [(10, 40, 8, False), (10, 48, 8, True), (3, 48, 16, False), (3, 60, 16, True), (0, 0, 0, False)],
)
def test_whether_a_batch_of_average_requests_fits(requests, prompt, new, too_long):
    """There is room for 192 tokens, and a tenth more is not worth a word."""
    asked = RequestLengths(requests, requests * prompt, prompt, requests * new, new)
    assert too_long_together(asked, POLICY) is too_long


def test_what_the_policy_was_solved_for_is_no_matter_of_advice(run):
    captured, _ = run([line(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS[:4])], "--quiet")
    assert captured.err == ""


def test_the_search_that_is_told_solves_it(run, folder, tmp_path, capsys):
    """Also for requests that this policy refuses, but not for those that no policy can run."""
    long = (PROMPTS[0] * 9)[:110]
    lines = [
        *(line(f"r{i}", prompt, max_tokens=9 + i) for i, prompt in enumerate(PROMPTS)),
        line("long", long, max_tokens=3),
        line("beyond the model", [3] * 300, max_tokens=3),
    ]
    captured, done = run(lines, "--quiet")
    assert done["long"]["error"] is not None
    (told,) = captured.err.splitlines()
    wanted = f"prompts of up to 110 tokens and {(sum(map(len, PROMPTS)) + 110) / 11:.1f} on average"
    assert wanted in told
    assert "18 generated" in told
    command = shlex.split(told.partition("solve one for it: ")[2])
    assert command[:2] == ["hrm", "search"]
    with suppress(SystemExit):
        hrm_main(command[1:])
    policy = load_policy_file(tmp_path / "policy-for-prompts.json")
    assert policy.workload.num_requests == 11
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "run"
    arguments = run_words(folder, tmp_path / "policy-for-prompts.json", prompts, output, "--resume", "--quiet")
    capsys.readouterr()
    assert exit_code(arguments) == 0
    assert capsys.readouterr().err == ""
    after = outputs(tmp_path / "run")
    assert tokens_of(after["long"]) == transformers_greedy(folder, long, 3)
    assert {n for n, item in after.items() if item["error"]} == {"beyond the model"}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["totals"]["requests"] == 1
