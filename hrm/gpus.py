"""Several GPUs of one machine, alike or not: what they or some have together, each at least, and shared links.

Links that are all in use at once get equal parts of what they share, and what a slow one cannot use
goes to the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, groupby
from typing import Final

from hrm.errors import ProfileError
from hrm.hardware import Figure, GpuCard, HardwareProfile, Host, Link, MemoryLevel, Rate, Source
from hrm.units import counted, format_bandwidth

MOST_KINDS: Final = 3  # of GPU, any of which are tried without the others; of more, each kind alone is
MOST_COUNTS: Final = 16  # of equal GPUs, of which any smaller number is tried; of more, powers of two are

_Choice = Callable[[Sequence[float]], float]  # `sum` or `min`, of the figures of all GPUs


def names_text(cards: Sequence[GpuCard]) -> str:
    """How --gpus names them: `2xT4+1xL4`."""
    counted = ((len(list(alike)), name) for name, alike in groupby(card.name for card in cards))
    return "+".join(f"{count}x{name}" for count, name in counted)


def alike(cards: Sequence[GpuCard]) -> bool:
    """Whether all are the same."""
    return all(card == cards[0] for card in cards)


def side_by_side(cards: Sequence[GpuCard], count: int) -> tuple[MemoryLevel, list[Link], Link]:
    """The level, the links from and to the host, and the peer link of these GPUs, or of so many like the only one."""
    first = cards[0]
    if alike(cards):
        return _sum_level(first.level, count), [_sum_link(link, count) for link in (first.h2d, first.d2h)], first.peer
    links = [link_together([card.h2d for card in cards]), link_together([card.d2h for card in cards])]
    return level_together(cards), links, _slowest_link([card.peer for card in cards])


def only_gpus(profile: HardwareProfile, gpus: Sequence[int]) -> HardwareProfile:
    """The machine with those of its several GPUs alone, by their numbers.

    Their links move together what they do alone, up to what those of all GPUs do.
    """
    numbers = tuple(gpus)
    return profile.part(("gpus", numbers), lambda: _only_gpus(profile, numbers))


def _only_gpus(profile: HardwareProfile, gpus: tuple[int, ...]) -> HardwareProfile:
    count, whole = len(gpus), profile.num_gpus
    cards = tuple(profile.gpus[gpu] for gpu in gpus) if profile.gpus else ()
    if cards:
        level, links, peer = side_by_side(cards, count)
        name = names_text(cards)
    else:
        note = f"{count} of {whole} GPUs"
        level = change_level(profile.top, lambda figure: figure.times(count / whole, note=note))
        links, peer = [_part_of(link, count, whole) for link in (profile.h2d, profile.d2h)], profile.peer
        name = note
    what = "what all GPUs' links move together"
    totals = [link.bandwidth_bytes_per_s.planned for link in (profile.h2d, profile.d2h)]
    links = [limited(link, total, what) for link, total in zip(links, totals, strict=True)]
    return replace(
        profile,
        name=f"{name} of {profile.name}",
        num_gpus=count,
        gpus=() if not cards or alike(cards) else cards,
        levels=(level, *profile.levels[1:]),
        links=(*links, *([peer] if count > 1 else []), *_of_host(profile)),
    )


def smaller_sets(profile: HardwareProfile) -> list[tuple[int, ...]]:
    """The GPUs that are left if some are not used, by their numbers: those of one or more kinds, and fewer of one.

    The largest sets come first.
    """
    every = profile.gpus or (None,) * profile.num_gpus
    kinds = [every.index(card) for card in every]
    first = sorted(set(kinds))
    sizes = range(1, len(first) + 1) if len(first) <= MOST_KINDS else (1, len(first))
    kept = [set(some) for size in sizes for some in combinations(first, size)]
    sets = [tuple(gpu for gpu, kind in enumerate(kinds) if kind in some) for some in kept]
    of_one_kind = [gpus for gpus, some in zip(sets, kept, strict=True) if len(some) == 1]
    fewer = [gpus[:count] for gpus in of_one_kind for count in _smaller_counts(len(gpus))]
    return sorted((gpus for gpus in {*sets, *fewer} if len(gpus) < len(kinds)), key=lambda gpus: (-len(gpus), gpus))


def _smaller_counts(count: int) -> list[int]:
    return list(range(1, count)) if count <= MOST_COUNTS else [1 << bit for bit in range((count - 1).bit_length())]


def _of_host(profile: HardwareProfile) -> tuple[Link, ...]:
    """The links within the host."""
    return tuple(link for link in profile.links if profile.top.name not in (link.source, link.target))


def level_together(cards: Sequence[GpuCard]) -> MemoryLevel:
    """Memory, bandwidth and compute of all GPUs as one level, in the dtypes that all of them know."""
    levels = [card.level for card in cards]
    level = _combined_level(levels, sum)
    return replace(
        level,
        capacity_bytes=_combined([one.capacity_bytes for one in levels], sum),
        reserve_bytes=_combined([one.reserve_bytes for one in levels], sum),
        processor=replace(level.processor, name=" + ".join(one.processor.name for one in levels)),
    )


def link_together(links: Sequence[Link]) -> Link:
    """All links side by side; a transfer is split over them, so curves stretch over size."""
    rate = _combined_rate([link.bandwidth_bytes_per_s for link in links], sum, size_factor=len(links))
    return replace(links[0], latency_s=_slowest([link.latency_s for link in links]), bandwidth_bytes_per_s=rate)


def smallest_of(cards: Sequence[GpuCard]) -> GpuCard:
    """A GPU that has of everything as little as any of them: each of them can do what it does."""
    least = min((card.level for card in cards), key=lambda level: level.usable_bytes)
    level = _combined_level([card.level for card in cards], min)
    return replace(
        cards[0],
        name=f"the least of {names_text(cards)}",
        level=replace(level, capacity_bytes=least.capacity_bytes, reserve_bytes=least.reserve_bytes),
        h2d=_slowest_link([card.h2d for card in cards]),
        d2h=_slowest_link([card.d2h for card in cards]),
        peer=_slowest_link([card.peer for card in cards]),
    )


def each_gpu(profile: HardwareProfile, change: Callable[[HardwareProfile], HardwareProfile]) -> tuple[GpuCard, ...]:
    """The machine's GPUs, each changed as if it were the only one; none where all are alike."""

    def changed(card: GpuCard) -> GpuCard:
        alone = replace(
            profile,
            num_gpus=1,
            gpus=(),
            levels=(card.level, profile.host),
            links=(card.h2d, card.d2h, card.peer, *_of_host(profile)),
        )
        after = change(alone)
        return replace(card, level=after.top, h2d=after.h2d, d2h=after.d2h, peer=after.peer)

    return tuple(map(changed, profile.gpus))


# --------------------------------------------------------------------------------- shared links


def behind_shared_links(cards: Sequence[GpuCard], host: Host) -> tuple[GpuCard, ...]:
    """The GPUs with the links that they have while all are in use, where some share one.

    Raises ProfileError if GPUs share a link that are not there for any number of GPUs.
    """
    found = list(cards)
    for shared in host.shared_links:
        if max(shared.gpus) >= host.max_gpus:
            raise ProfileError(
                f"{host.name}: shared_links.gpus",
                list(shared.gpus),
                f"must be numbers below the {host.max_gpus} GPUs of max_gpus",
                "count GPUs from 0",
            )
        there = [gpu for gpu in shared.gpus if gpu < len(cards)]
        limit = shared.bandwidth_bytes_per_s.planned
        what = f"the link that {counted(len(there), 'GPU')} may use"
        for gpu, card in zip(there, _sharing([cards[gpu] for gpu in there], limit, limit, what), strict=True):
            found[gpu] = card
    return tuple(found)


def at_once(profile: HardwareProfile) -> tuple[GpuCard, ...]:
    """The machine's GPUs, each with its part of what the links of all move together."""
    h2d, d2h = (link.bandwidth_bytes_per_s.planned for link in (profile.h2d, profile.d2h))
    return tuple(_sharing(profile.gpus, h2d, d2h, "what all GPUs' links move together"))


def limited(link: Link, limit: Figure, what: str) -> Link:
    """The link with no more than a limit, which the note names with what sets it."""
    planned = link.bandwidth_bytes_per_s.planned
    if planned.value <= limit.value:
        return link
    capped = Figure(
        value=limit.value,
        source=Source.DERIVED,
        note=f"limited by {what} at {format_bandwidth(limit.value)} ({limit.source})",
        curve=tuple((size, min(value, limit.value)) for size, value in planned.curve),
        unshared=planned.unshared or planned.value,
    )
    return replace(link, bandwidth_bytes_per_s=replace(link.bandwidth_bytes_per_s, achieved=capped))


def fair_shares(whole: float, wanted: Sequence[float]) -> list[float]:
    """What each gets of a whole of which all want their part at once: as much as any other, or all it wants."""
    shares, left = list(wanted), whole
    in_order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for taken, index in enumerate(in_order):
        shares[index] = min(wanted[index], left / (len(wanted) - taken))
        left -= shares[index]
    return shares


def _sharing(cards: Sequence[GpuCard], h2d: Figure, d2h: Figure, what: str) -> list[GpuCard]:
    """GPUs whose links to and from the host together move so much."""

    def shared(links: list[Link], whole: Figure) -> list[Link]:
        wanted = [link.bandwidth_bytes_per_s.planned.value for link in links]
        if sum(wanted) <= whole.value * (1 + 1e-9):
            return links
        shares = fair_shares(whole.value, wanted)
        part = f"its part of {what}, {format_bandwidth(whole.value)},"
        return [
            limited(link, replace(whole, value=share, curve=()), part)
            for link, share in zip(links, shares, strict=True)
        ]

    to_gpu, to_host = shared([card.h2d for card in cards], h2d), shared([card.d2h for card in cards], d2h)
    return [replace(card, h2d=up, d2h=down) for card, up, down in zip(cards, to_gpu, to_host, strict=True)]


# ------------------------------------------------------------------------------------ combining


def _combined_level(levels: Sequence[MemoryLevel], choose: _Choice) -> MemoryLevel:
    """Rates of all, in the dtypes that all know; latencies are those of the slowest. Sizes are the first's."""

    def of_all(rates: Sequence[Rate | None]) -> Rate | None:
        known = [rate for rate in rates if rate is not None]
        return _combined_rate(known, choose) if len(known) == len(levels) else None

    processors = [level.processor for level in levels]
    knows_attention = any(processor.attention_bytes_per_s for processor in processors)
    attention = [level.processor.attention_bytes_per_s or level.read_bytes_per_s for level in levels]
    requests = [found for processor in processors if (found := processor.attention_request_s) is not None]
    dtypes = [
        name for name in processors[0].compute_flops_per_s if all(name in p.compute_flops_per_s for p in processors)
    ]
    return replace(
        levels[0],
        read_bytes_per_s=_combined_rate([level.read_bytes_per_s for level in levels], choose),
        copy_bytes_per_s=of_all([level.copy_bytes_per_s for level in levels]),
        shared_bytes_per_s=of_all([level.shared_bytes_per_s for level in levels]),
        caches=(),
        processor=replace(
            processors[0],
            cores=int(choose([processor.cores for processor in processors])),
            compute_flops_per_s={
                name: _combined_rate([p.compute_flops_per_s[name] for p in processors], choose) for name in dtypes
            },
            attention_bytes_per_s=_combined_rate(attention, choose) if knows_attention else None,
            attention_request_s=_slowest(requests) if requests else None,
            fuses_operators=all(processor.fuses_operators for processor in processors),
            groups_experts=all(processor.groups_experts for processor in processors),
            native_up_to={},
            launch_latency_s=_slowest([processor.launch_latency_s for processor in processors]),
        ),
    )


def _combined_rate(rates: Sequence[Rate], choose: _Choice, *, size_factor: float = 1.0) -> Rate:
    """The planned figures of all, and those on paper and at best where all have them."""

    def of(figures: Sequence[Figure | None]) -> Figure | None:
        known = [figure for figure in figures if figure is not None]
        return _combined(known, choose, size_factor=size_factor) if len(known) == len(rates) else None

    return Rate(
        datasheet=of([rate.datasheet for rate in rates]),
        ceiling=of([rate.ceiling for rate in rates]),
        achieved=of([rate.planned for rate in rates]),
    )


def _combined(figures: Sequence[Figure], choose: _Choice, *, size_factor: float = 1.0) -> Figure:
    """The figures of all GPUs as one; what is assumed of one of them is assumed of all together."""
    sizes = sorted({size for figure in figures for size, _ in figure.curve})
    low, high = ([figure.p20 for figure in figures], [figure.p80 for figure in figures])
    sources = {figure.source for figure in figures}
    return Figure(
        value=choose([figure.value for figure in figures]),
        source=Source.ASSUMED if Source.ASSUMED in sources else min(sources) if len(sources) == 1 else Source.DERIVED,
        note="of all GPUs together" if choose is sum else "the least of all GPUs",
        curve=tuple((size * size_factor, choose([figure.at(size) for figure in figures])) for size in sizes),
        p20=choose([end for end in low if end is not None]) if None not in low else None,
        p80=choose([end for end in high if end is not None]) if None not in high else None,
    )


def _slowest(latencies: Sequence[Figure]) -> Figure:
    return max(latencies, key=lambda figure: figure.value)


def _slowest_link(links: Sequence[Link]) -> Link:
    rate = _combined_rate([link.bandwidth_bytes_per_s for link in links], min)
    return replace(links[0], latency_s=_slowest([link.latency_s for link in links]), bandwidth_bytes_per_s=rate)


def change_level(level: MemoryLevel, change: Callable[[Figure], Figure]) -> MemoryLevel:
    """The level with its sizes and rates changed; latencies and the number of cores stay."""

    def changed(rate: Rate | None) -> Rate | None:
        return None if rate is None else rate.each(change)

    processor = level.processor
    return replace(
        level,
        capacity_bytes=change(level.capacity_bytes),
        reserve_bytes=change(level.reserve_bytes),
        pinnable_bytes=None if level.pinnable_bytes is None else change(level.pinnable_bytes),
        read_bytes_per_s=level.read_bytes_per_s.each(change),
        copy_bytes_per_s=changed(level.copy_bytes_per_s),
        shared_bytes_per_s=changed(level.shared_bytes_per_s),
        caches=tuple(
            replace(
                cache, capacity_bytes=change(cache.capacity_bytes), read_bytes_per_s=cache.read_bytes_per_s.each(change)
            )
            for cache in level.caches
        ),
        processor=replace(
            processor,
            compute_flops_per_s={dtype: rate.each(change) for dtype, rate in processor.compute_flops_per_s.items()},
            attention_bytes_per_s=changed(processor.attention_bytes_per_s),
        ),
    )


def _sum_level(level: MemoryLevel, count: int) -> MemoryLevel:
    """So many equal levels at once; the processor keeps the name of one, by which a part's card is found."""
    return change_level(level, lambda figure: figure.times(count, note=f"times {count}")) if count > 1 else level


def _sum_link(link: Link, count: int) -> Link:
    """So many equal links at once; a transfer is split over them, so curves stretch over size."""
    if count == 1:
        return link

    def total(figure: Figure) -> Figure:
        return figure.times(count, note=f"times {count}", size_factor=count)

    return replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s.each(total))


def _part_of(link: Link, count: int, whole: int) -> Link:
    """That of so many of the equal GPUs whose link it is, each with what it moves if others do not."""
    planned = link.bandwidth_bytes_per_s.planned
    alone = (planned.unshared or planned.value) / planned.value

    def part(figure: Figure) -> Figure:
        factor = count / whole * (alone if figure is planned else 1)
        return replace(figure.times(factor, note=f"{count} of {whole} GPUs", size_factor=count / whole), unshared=None)

    return replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s.each(part))
