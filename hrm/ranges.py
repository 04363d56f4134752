"""How far a prediction may be off because figures of the machine are assumed, or spread.

An assumed figure may be 30 % off, as far as this project knows: between data sheets and what was
measured of the same hardware lies about as much. A measured one lies between the 20th and the 80th
percentile of its samples. The ends of the range are what the same policy does where all such
figures are at their worse ends, and where all are at their better ends, no rate above its data
sheet. Data sheets, fits and what was derived or given have no range of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Final, TypeVar, cast

from hrm.closed_form import Point, batch_seconds
from hrm.costs import Costs
from hrm.estimate import estimate, what_tells_apart
from hrm.hardware import Figure, HardwareProfile, Link, MemoryLevel, Processor, Rate, Source
from hrm.model_spec import ModelSpec
from hrm.parallel import Share, shares_for
from hrm.policy import Policy
from hrm.workload import Workload

Change = Callable[[str, Figure], Figure]
_Part = TypeVar("_Part", MemoryLevel, Link, Processor)

ASSUMED_SHARE: Final = 0.3  # by which an assumed figure may be off
MATTERS: Final = 0.01  # a figure whose worse end costs less of the throughput is not named


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputRange:
    """The tokens a second at both ends, and the figures that make most of the difference.

    `assumed` and `spread` are their names, those that are assumed and those whose samples spread.
    """

    low_tokens_per_s: float
    high_tokens_per_s: float
    assumed: tuple[str, ...]
    spread: tuple[str, ...]

    @property
    def is_narrow(self) -> bool:
        """Whether the ends are the same for all that matters."""
        return self.high_tokens_per_s < (1 + MATTERS) * self.low_tokens_per_s


def throughput_range(
    spec: ModelSpec, policy: Policy, profile: HardwareProfile, workload: Workload
) -> ThroughputRange | None:
    """The range of a policy's tokens/s on a machine; None if no figure has a range."""
    uncertain = _uncertain(profile)
    if not uncertain:
        return None
    now_s = _batch_s(spec, policy, profile, workload)
    costly = {
        name: figure
        for name, figure in uncertain.items()
        if _batch_s(spec, policy, _moved(profile, worse=True, only=name), workload) > (1 + MATTERS) * now_s
    }
    low, high = (estimate(spec, policy, _moved(profile, worse=worse), workload).tokens_per_s for worse in (True, False))
    is_assumed = {name: figure.source is Source.ASSUMED for name, figure in costly.items()}
    return ThroughputRange(
        low_tokens_per_s=low,
        high_tokens_per_s=high,
        assumed=tuple(name for name, assumed in is_assumed.items() if assumed),
        spread=tuple(name for name, assumed in is_assumed.items() if not assumed),
    )


def _batch_s(spec: ModelSpec, policy: Policy, profile: HardwareProfile, workload: Workload) -> float:
    """Closed-form seconds of a batch."""

    def seconds(share: Share) -> tuple[float, float]:
        costs = Costs(*share.part, policy.formats)
        return batch_seconds(costs, Point.of_policy(share.policy, costs.spec), policy.schedule, workload)

    unlike = {what_tells_apart(share): share for share in shares_for(policy, spec, profile)}
    return float(sum(map(max, zip(*map(seconds, unlike.values()), strict=True))))


_NAMES: Final = {
    "read_bytes_per_s": "memory bandwidth",
    "copy_bytes_per_s": "copies in memory",
    "shared_bytes_per_s": "bandwidth of all at once",
    "attention_bytes_per_s": "decode attention",
    "attention_request_s": "attention per request",
    "compute_flops_per_s": "compute",
    "launch_latency_s": "launch latency",
    "bandwidth_bytes_per_s": "bandwidth",
    "latency_s": "latency",
}
_LATENCIES: Final = ("attention_request_s", "launch_latency_s", "latency_s")


def _uncertain(profile: HardwareProfile) -> dict[str, Figure]:
    """The figures with a range, by the names that reports have for them."""
    found: dict[str, Figure] = {}

    def note(name: str, figure: Figure) -> Figure:
        if _factor(figure, worse=True) != 1 or _factor(figure, worse=False) != 1:
            found.setdefault(name, figure)
        return figure

    _each(profile, note)
    return found


def _moved(profile: HardwareProfile, *, worse: bool, only: str = "") -> HardwareProfile:
    """The machine with its uncertain figures at one end, or one of them."""

    def move(name: str, figure: Figure) -> Figure:
        if only and name != only:
            return figure
        lower = worse != name.endswith(("latency", "per request"))
        return replace(figure.times(_factor(figure, worse=lower)), p20=None, p80=None)

    return _each(profile, move)


def _factor(figure: Figure, *, worse: bool) -> float:
    """What the lower (worse) or upper end of a figure is times its value."""
    if figure.source is Source.ASSUMED:
        return 1 - ASSUMED_SHARE if worse else 1 + ASSUMED_SHARE
    end = figure.p20 if worse else figure.p80
    return 1.0 if end is None or figure.value <= 0 or end <= 0 else end / figure.value


def _each(profile: HardwareProfile, change: Change) -> HardwareProfile:
    """The machine with `change(name, figure)` in place of every figure that plans depend on."""
    return replace(
        profile,
        levels=tuple(_changed(level, level.name, change) for level in profile.levels),
        links=tuple(_changed(link, _link_name(link), change) for link in profile.links),
        gpus=tuple(
            replace(
                card,
                level=_changed(card.level, card.level.name, change),
                h2d=_changed(card.h2d, _link_name(card.h2d), change),
                d2h=_changed(card.d2h, _link_name(card.d2h), change),
                peer=_changed(card.peer, _link_name(card.peer), change),
            )
            for card in profile.gpus
        ),
    )


def _link_name(link: Link) -> str:
    kind = "" if link.kind == "pinned" else f" {link.kind}"
    return f"{link.source} to {link.target}{kind}"


def _changed(node: _Part, name: str, change: Change) -> _Part:
    """A part of a machine, its figures changed; sizes stay, and so do caches."""
    changes: dict[str, Any] = {}
    for item in fields(node):
        value = getattr(node, item.name)
        named = f"{name} {_NAMES.get(item.name, '')}".rstrip()
        if isinstance(value, Rate):
            changes[item.name] = _changed_rate(value, named, change)
        elif isinstance(value, Figure) and item.name in _LATENCIES:
            changes[item.name] = change(named, value)
        elif item.name == "compute_flops_per_s":
            rates = cast("dict[str, Rate]", value)
            changes[item.name] = {
                dtype: _changed_rate(rate, f"{named} in {dtype}", change) for dtype, rate in rates.items()
            }
        elif isinstance(value, Processor):
            changes[item.name] = _changed(value, name, change)
    return replace(node, **changes)


def _changed_rate(rate: Rate, name: str, change: Change) -> Rate:
    planned = rate.planned
    moved = change(name, planned)
    if moved is planned:
        return rate
    most = max(planned.value, rate.datasheet.value) if rate.datasheet else moved.value
    if moved.value > most:  # no better than the data sheet
        moved = replace(moved.times(most / moved.value), value=most)
    return Rate(datasheet=rate.datasheet if moved.value <= most else None, achieved=moved)
