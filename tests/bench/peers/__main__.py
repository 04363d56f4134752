"""Our executor on the CPU against the engines that others run there, in turns.

    python -m tests.bench.peers                             # all peers, both models, three repeats
    python -m tests.bench.peers --peers vllm --models mixtral --rows 32x32 --repeats 1
    python -m tests.bench.peers --scale small --repeats 1   # a rehearsal; its figures say nothing
    python -m tests.bench.peers --out FOLDER                # go on with what was killed there, or print it again

Every engine computes the same random prompts greedily in bfloat16, loaded once a turn in a process of its own.
README.md in the folder above tells more.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from hrm.errors import HrmError
from tests.bench.machine import circumstances
from tests.bench.peers.environments import PeerFailedError, python_of
from tests.bench.peers.report import tables
from tests.bench.peers.setting import PEERS, SCALES, Setting, parse_names, parse_rows, peers_folder
from tests.bench.peers.turns import run_turns


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up, take turns, print the tables; 0 if every engine got through, 1 if one did not, 2 after a mistake."""
    options = _options(sys.argv[1:] if arguments is None else arguments)
    try:
        setting = setting_of(options)
        if options.set_up:
            return set_up(setting)
        outcomes = run_turns(setting)
    except HrmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{circumstances()}\nturns and logs in {setting.out}")
    print("\n".join(tables(setting, outcomes)))
    return int(any(outcome.failed for outcome in outcomes))


def set_up(setting: Setting) -> int:
    """Make the environments, and nothing else."""
    failed = 0
    for peer in setting.peers:
        try:
            print(f"{peer}: {python_of(peer)}")
        except PeerFailedError as error:
            print(f"{peer} is left out: {error}")
            failed = 1
    return failed


def setting_of(options: argparse.Namespace) -> Setting:
    """The options as they are meant; HrmError for one that is not understood."""
    scale = SCALES[options.scale]
    if options.repeats < 1:
        raise HrmError("--repeats", options.repeats, "must be at least 1", "raise it")
    now = datetime.now(UTC).strftime("%Y-%m-%d-%H%M%S")
    return Setting(
        scale=scale,
        peers=parse_names(options.peers, PEERS, "--peers"),
        models=parse_names(options.models, tuple(scale.configs), "--models"),
        rows=parse_rows(options.rows, scale.rows),
        repeats=options.repeats,
        out=options.out or peers_folder() / "runs" / now,
        turn_minutes=options.turn_minutes,
    )


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default="", metavar="A,B,…", help=f"which of {', '.join(PEERS)} [default: all]")
    parser.add_argument("--models", default="", metavar="A,B", help="mixtral, qwen, or both [default]")
    parser.add_argument("--rows", default="", metavar="32x32,…", help="requests × new tokens [default: 32x32,128x16]")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each engine [default: 3]")
    parser.add_argument("--scale", choices=list(SCALES), default="full", help="small takes seconds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the turns; goes on with those that it holds")
    parser.add_argument("--turn-minutes", type=float, default=30.0, metavar="M", help="longest turn [default: 30]")
    parser.add_argument("--set-up", action="store_true", help="only make the environments")
    return parser.parse_args(list(arguments))


if __name__ == "__main__":
    sys.exit(main())
