"""Links of GPUs: each alone, all at once, and among them; measured and put together."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import TYPE_CHECKING, Any, Final

from hrm.hardware import CPU, GPU, Figure, Link, Source
from hrm.profiling.machine.run import Run
from hrm.units import MIB, format_bandwidth

if TYPE_CHECKING:
    from hrm.profiling.gpu import AbstractGpu
    from hrm.profiling.nvml import GpuFacts

PEER_TRANSFER: Final = 128 * MIB
SLOW: Final = 0.90  # a link below this share of the fastest is named


def add_links(run: Run, gpus: Sequence["AbstractGpu"], largest: int) -> tuple[list[str], list[str]]:
    """Names of the steps of the links that are planned with, and of each GPU's own."""
    planned: list[str] = []
    alone: list[str] = []
    for to_device in (True, False):
        planned += [
            _add_link(run, gpus, GPU, largest, to_device=to_device, pinned=True),
            _add_link(
                run,
                gpus[:1],
                GPU,
                largest,
                to_device=to_device,
                pinned=False,
                note="one GPU at a time" if len(gpus) > 1 else "",
            ),
        ]
    if len(gpus) > 1:
        alone += [
            _add_link(run, [gpu], f"{GPU}{index}", largest, to_device=to_device, pinned=True)
            for index, gpu in enumerate(gpus)
            for to_device in (True, False)
        ]
        neighbours = [(i, (i + 1) % len(gpus)) for i in range(len(gpus))]
        pairs = neighbours if run.options.quick else list(permutations(range(len(gpus)), 2))
        of_peer = min(largest, PEER_TRANSFER)
        alone += [_add_peer(run, gpus, pair, of_peer, len(pairs)) for pair in pairs]
    return planned, alone


def _add_link(
    run: Run, gpus: Sequence["AbstractGpu"], name: str, largest: int, *, to_device: bool, pinned: bool, note: str = ""
) -> str:
    """A step for the link of one GPU, or of several at once; returns its name."""
    from hrm.profiling.gpu import together
    from hrm.profiling.gpu_link import gpu_transfer
    from hrm.profiling.link import measure_link, transfer_sizes

    source, target = (CPU, name) if to_device else (name, CPU)
    kind = "pinned" if pinned else "pageable"

    def transfers(seconds: float) -> Link:
        several = len(gpus) > 1
        most = largest * len(gpus)
        transfer = gpu_transfer(gpus, to_device=to_device, pinned=pinned, largest_bytes=most)
        return measure_link(
            source,
            target,
            transfer,
            sizes=transfer_sizes(most, quick=run.options.quick),
            budget_s=seconds,
            kind=kind,
            note=f"all {len(gpus)} GPUs at once, each its share" if several else note,
            sampler=together(gpus) if several else gpus[0].sampler(),
        )

    step = f"{kind} link {source} to {target}"
    run.steps.add(step, 2, transfers, Link)
    return step


def _add_peer(run: Run, gpus: Sequence["AbstractGpu"], pair: tuple[int, int], largest: int, pairs: int) -> str:
    from hrm.profiling.gpu_link import peer_transfer
    from hrm.profiling.link import measure_link, transfer_sizes

    source, target = (gpus[index] for index in pair)

    def transfers(seconds: float) -> Link:
        straight = source.reaches(target)
        return measure_link(
            f"{GPU}{pair[0]}",
            f"{GPU}{pair[1]}",
            peer_transfer(source, target, largest),
            sizes=transfer_sizes(largest, quick=run.options.quick),
            budget_s=seconds,
            kind="peer",
            note="straight" if straight else "through the host's memory",
            sampler=source.sampler(),
        )

    step = f"peer link {GPU}{pair[0]} to {GPU}{pair[1]}"
    run.steps.add(step, 6 / pairs, transfers, Link)
    return step


def links_of(
    results: dict[str, Any], planned: Sequence[str], alone: Sequence[str], facts: "Sequence[GpuFacts]", count: int
) -> tuple[list[Link], list[str]]:
    """All links, with what PCIe can do at most, and warnings of those that fall behind."""
    warnings: list[str] = []
    own: list[Link] = [results[step] for step in alone]
    links: list[Link] = []
    for step in planned:
        link: Link = results[step]
        total = [fact.pcie_bytes_per_s for fact in facts]
        if link.kind == "pinned":
            same = [x for x in own if _direction(x) == _direction(link)]
            link = _with_ceiling(link, same)
            known = [pcie for pcie in total if pcie is not None]
            if len(known) == count:
                link = _with_pcie(link, sum(known), warnings)
            warnings += _slow_slots(same)
        links.append(link)
    peers = [link for link in own if link.kind == "peer"]
    if peers:
        slowest = min(peers, key=lambda link: link.bandwidth_bytes_per_s.at())
        links.append(replace(slowest, source=GPU, target=GPU))
    return [*links, *own], warnings


def _direction(link: Link) -> str:
    if link.kind == "peer":
        return "peer"
    return "h2d" if link.source == CPU else "d2h"


def _with_ceiling(link: Link, alone: Sequence[Link]) -> Link:
    """All GPUs at once get at most the sum of what each gets alone."""
    if not alone:
        return link
    ceiling = Figure(
        value=sum(one.bandwidth_bytes_per_s.at() for one in alone),
        source=Source.DERIVED,
        note=f"the sum of {len(alone)} GPUs' links, each alone",
    )
    return replace(link, bandwidth_bytes_per_s=replace(link.bandwidth_bytes_per_s, ceiling=ceiling))


def _with_pcie(link: Link, pcie_bytes_per_s: float, warnings: list[str]) -> Link:
    """With the rate of PCIe as negotiated, unless the link is faster: the system then errs."""
    rate = link.bandwidth_bytes_per_s
    fastest = max(figure.value for figure in (rate.achieved, rate.ceiling) if figure is not None)
    if fastest > 1.05 * pcie_bytes_per_s:
        warnings.append(
            f"{link.source} to {link.target} moves {format_bandwidth(fastest)}, more than"
            f" PCIe as the driver tells it ({format_bandwidth(pcie_bytes_per_s)})"
        )
        return link
    sheet = Figure(value=pcie_bytes_per_s, source=Source.DATASHEET, note="PCIe as negotiated, one direction")
    return replace(link, bandwidth_bytes_per_s=replace(rate, datasheet=sheet))


def _slow_slots(links: Sequence[Link]) -> list[str]:
    """GPUs whose own link is slower than the fastest one's: a bad slot is common."""
    rates = [link.bandwidth_bytes_per_s.at() for link in links]
    return [
        f"the link {link.source} to {link.target} reaches {rate / max(rates):.0%} of the fastest"
        for link, rate in zip(links, rates, strict=True)
        if rate < SLOW * max(rates)
    ]
