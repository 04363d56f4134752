"""Options that limit how long a request may wait."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from hrm.latency import LatencyLimits
from hrm.units import parse_seconds


def limits_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `limits: LatencyLimits` from --max-ttft and --max-tpot."""

    @click.option("--max-ttft", metavar="30s", help="Every first token within so long of the start of its batch.")
    @click.option("--max-tpot", metavar="200ms", help="Every other token within so long, on average.")
    @wraps(command)
    def wrapper(*args: Any, max_ttft: str | None, max_tpot: str | None, **options: Any) -> Any:
        limits = LatencyLimits(
            max_ttft_s=None if max_ttft is None else parse_seconds(max_ttft, "--max-ttft"),
            max_tpot_s=None if max_tpot is None else parse_seconds(max_tpot, "--max-tpot"),
        )
        return command(*args, limits=limits, **options)

    return wrapper
