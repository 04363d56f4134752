"""Turns: who is next, each in a process of its own, and each kept as a line of JSON as soon as it is over."""

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from hrm.contract.openmp import SPINS
from hrm.errors import HrmError
from tests.bench.machine import cpu
from tests.bench.peers.drivers.turn import Job
from tests.bench.peers.environments import PeerFailedError, python_of, run_logged
from tests.bench.peers.setting import DRIVERS, OURS, ROOFS, Setting, peers_folder
from tests.bench.reference_checkpoint import cache_folder, reference_checkpoint

ROOT: Final = Path(__file__).parents[3]
JOURNAL: Final = "turns.jsonl"


@dataclass(frozen=True, slots=True)
class Turn:
    """An engine's go at all rows of a model, or the roofs before it."""

    model: str
    repeat: int
    engine: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a turn: what it found, or why it failed."""

    turn: Turn
    found: dict[str, Any] = field(default_factory=dict[str, Any])
    failed: str = ""
    ended: str = ""


def order(setting: Setting) -> Iterator[Turn]:
    """Model by model; each repeat begins with the roofs and with the next engine, so that none always follows another.

    The roofs come once more after a model's last turn.
    """
    engines = setting.engines
    for model in setting.models:
        for repeat in range(setting.repeats):
            yield Turn(model, repeat, ROOFS)
            first = repeat % len(engines)
            for engine in engines[first:] + engines[:first]:
                yield Turn(model, repeat, engine)
        yield Turn(model, setting.repeats, ROOFS)


def read_journal(out: Path, setting: Setting) -> list[Outcome]:
    """The outcomes of an earlier run in the folder; HrmError if they are of another machine or setting."""
    path = out / JOURNAL
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines and not _is_whole(lines[-1]):
        lines.pop()  # cut off when the run was killed
    if not lines:
        return []
    head, now = json.loads(lines[0]), _head(setting)
    for key, value in now.items():
        if head.get(key) != value:
            rule = f"holds turns of {key} {head.get(key)}, and this run has {value}"
            raise HrmError("--out", str(out), rule, "name another folder")
    rest = [json.loads(line) for line in lines[1:]]
    return [Outcome(Turn(**line.pop("turn")), **line) for line in rest]


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _head(setting: Setting) -> dict[str, Any]:
    return {"cpu": cpu(), **setting.compared()}


def write_journal(out: Path, setting: Setting, outcomes: Sequence[Outcome]) -> None:
    """All outcomes until now, so that what follows is appended to whole lines."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [_head(setting), *map(asdict, outcomes)]
    (out / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def run_turns(setting: Setting) -> list[Outcome]:
    """Every turn that the folder does not hold yet; failed ones are tried again, but once a run and model."""
    done = [outcome for outcome in read_journal(setting.out, setting) if not outcome.failed]
    write_journal(setting.out, setting, done)
    if done:
        print(f"{len(done)} turns are in {setting.out} already", flush=True)
    held = {outcome.turn for outcome in done}
    failed = dict[tuple[str, str], Outcome]()
    for turn in order(setting):
        if turn in held or (turn.model, turn.engine) in failed:
            continue
        outcome = take(turn, setting)
        done.append(outcome)
        with (setting.out / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(asdict(outcome)) + "\n")
        if outcome.failed:
            failed[turn.model, turn.engine] = outcome
            print(f"  {turn.engine} is left out: {outcome.failed}", flush=True)
    return done


def take(turn: Turn, setting: Setting) -> Outcome:
    """Run a turn in a process of its own."""
    name = f"{turn.model}-{turn.repeat}-{turn.engine}"
    asked, found = setting.out / f"{name}.job.json", setting.out / f"{name}.found.json"
    found.unlink(missing_ok=True)
    try:
        python = python_of(turn.engine)
        asked.write_text(json.dumps(asdict(job(turn, setting))), encoding="utf-8")
        print(f"{turn.model}, repeat {turn.repeat + 1}: {turn.engine}", flush=True)
        command = [str(python), "-m", DRIVERS[turn.engine], str(asked), str(found)]
        usual = {"GOMP_SPINCOUNT": SPINS} if turn.engine in {OURS, ROOFS} else {}  # as `executor` sets it
        run_logged(command, setting.out / f"{name}.log", setting.turn_minutes, cwd=ROOT, usual=usual)
        result, failed = json.loads(found.read_text(encoding="utf-8")), ""
    except PeerFailedError as error:
        result, failed = {}, str(error)
    finally:
        asked.unlink(missing_ok=True)
        found.unlink(missing_ok=True)
    return Outcome(turn, result, failed, datetime.now(UTC).isoformat(timespec="seconds"))


def job(turn: Turn, setting: Setting) -> Job:
    """What the turn's engine is asked for; the checkpoint is made if it is not there."""
    scale = setting.scale
    config, folder = scale.configs[turn.model], cache_folder() / scale.folders[turn.model]
    kept = peers_folder() / "kept" / turn.engine / folder.name
    kept.mkdir(parents=True, exist_ok=True)
    requests = max(row.requests for row in setting.rows)
    return Job(
        checkpoint=str(reference_checkpoint(config, folder)),
        kept=str(kept),
        profile=str(setting.out / f"machine-{turn.model}.yaml"),
        small=setting.small,
        cpus=sorted(os.sched_getaffinity(0)),
        prompts=prompts(config["vocab_size"], requests, scale.prompt_len),
        rows=[[row.requests, row.new_tokens] for row in setting.rows],
    )


def prompts(vocab_size: int, requests: int, length: int) -> list[list[int]]:
    """The same random token ids for every engine and run."""
    drawn = random.Random(0)
    return [drawn.choices(range(vocab_size), k=length) for _ in range(requests)]
