"""Jobs on tiny checkpoints: lines in, `executor run`, lines out."""

import json
from pathlib import Path

from executor.cli import main
from executor.job.outputs import OUTPUTS
from tests.executor.runtime.support import machine
from tests.executor.tiny_models import random_prompts

PROMPTS = random_prompts(10, seed=3)
PROFILE = machine(bandwidth=1e9)


def line(name, prompt, **body) -> dict:
    return {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": prompt, "max_tokens": 5, "temperature": 0, **body},
    }


def run_words(model: Path, policy: Path, lines: Path, output_dir: Path, *more: str) -> list[str]:
    """The command line of a job."""
    paths = {"--model": model, "--policy": policy, "--input": lines, "--output-dir": output_dir}
    return ["run", *(word for option, path in paths.items() for word in (option, str(path))), *more]


def exit_code(arguments: list[str]) -> int | str | None:
    try:
        main(arguments)
    except SystemExit as ended:
        return ended.code
    return 0


def outputs(directory) -> dict[str, dict]:
    path = directory / OUTPUTS
    if not path.is_file():
        return {}
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    assert len({item["custom_id"] for item in lines}) == len(lines)
    return {item["custom_id"]: item for item in lines}


def tokens_of(item) -> list[int]:
    assert item["error"] is None, item
    return item["response"]["body"]["choices"][0]["token_ids"]


def refused(captured, *words) -> None:
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], captured.err


def write_lines(folder, lines):
    """The input file of lines (objects, or bytes as they stand)."""
    path = folder / "prompts.jsonl"
    path.write_bytes(b"\n".join(item if isinstance(item, bytes) else json.dumps(item).encode() for item in lines))
    return path
