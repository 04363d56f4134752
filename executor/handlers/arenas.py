"""The host's memory of a run: what crosses the link is pinned, as far as the system pins.

Weights are pinned where they lie if everything else that crosses the link can be too. If not, they
stay pageable and go through a few pinned pages, and of the rest as much is pinned as there is room.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from executor.backends import AbstractBackend
from executor.errors import RunError
from executor.loading import Loading
from hrm.buffers import Needs, Purpose, bytes_by_purpose
from hrm.memory import ALWAYS_PINNED, PINNED_IF_THERE_IS_ROOM
from hrm.model_spec import ModelSpec
from hrm.policy import Policy
from hrm.tasks import Device
from hrm.units import format_bytes


@final
@dataclass(frozen=True, slots=True)
class HostArenas:
    """The host's memory by purpose, the policy that runs in it, and the needs of all its buffers.

    The policy stages weights if that was asked for or if they could not be pinned. What should be
    pinned but is not is `pageable`. Of both `notice` tells in a line, with sizes.
    """

    policy: Policy
    needs: Needs
    memory: Mapping[Purpose, Tensor]
    pageable: tuple[Purpose, ...] = ()
    notice: str = ""

    @staticmethod
    def allocate(
        backend: AbstractBackend,
        spec: ModelSpec,
        policy: Policy,
        staged: Policy | None = None,
        *,
        batches: int = 1,
        loading: Loading | None = None,
    ) -> "HostArenas":
        """Allocate all of it, each purpose as large as planned for so many batches under way; `loading` tells how far.

        `staged` is the policy to run if not all can be pinned and `policy` does not stage. Raises
        RunError if there is none, or if not even what is always pinned can be.
        """
        loading, needs = loading or Loading(), Needs.of_policy(spec, policy, batches=batches)
        with backend.telling(loading.add):
            sizes = bytes_by_purpose(needs.on_host())
            loading.begin("taking memory", sum(sizes.values()))
            memory = dict(zip(sizes, backend.allocate_host(list(sizes.values())), strict=True))
            weights = () if policy.staging else (Purpose.WEIGHTS,)
            crossing = [memory[name] for name in (*ALWAYS_PINNED, *PINNED_IF_THERE_IS_ROOM, *weights)]
            loading.begin("pinning memory", _size(crossing))
            if policy.staging:
                return _staging(backend, policy, needs, memory)
            if all(backend.pin(arena) for arena in crossing):
                return HostArenas(policy, needs, memory)
            wanted = format_bytes(_size(crossing))
            if staged is None:
                raise _too_much(wanted, "with hrm search --staging")
            for arena in crossing:
                backend.unpin(arena)
            needs = Needs.of_policy(spec, staged, batches=batches)
            room = bytes_by_purpose(needs.on_host())[Purpose.STAGING]
            ring = memory[Purpose.STAGING] = backend.allocate(Device.CPU, room)
            notice = (
                f"the system does not pin all {wanted} of host memory that cross the link: weights "
                f"({format_bytes(memory[Purpose.WEIGHTS].nbytes)}) are staged through {format_bytes(ring.nbytes)} "
                "of pinned memory"
            )
            return _staging(backend, staged, needs, memory, notice)


def _staging(
    backend: AbstractBackend, policy: Policy, needs: Needs, memory: Mapping[Purpose, Tensor], notice: str = ""
) -> HostArenas:
    """Pin as much of everything but the weights as can be, and add to the notice what cannot."""
    always = [memory[name] for name in ALWAYS_PINNED]
    if not all(backend.pin(arena) for arena in always):
        raise _too_much(format_bytes(_size(always)), "for fewer requests at once")
    pageable = tuple(name for name in PINNED_IF_THERE_IS_ROOM if not backend.pin(memory[name]))
    if pageable:
        told = (f"{name.replace('_', ' ')} ({format_bytes(memory[name].nbytes)})" for name in pageable)
        no_room = f"no room to pin {' and '.join(told)}, whose transfers are slower for it"
        notice = f"{notice}; {no_room}" if notice else no_room
    return HostArenas(policy, needs, memory, pageable, notice)


def _size(arenas: Iterable[Tensor]) -> int:
    return sum(arena.nbytes for arena in arenas)


def _too_much(wanted: str, remedy: str) -> RunError:
    return RunError(
        "pinned memory",
        f"<{wanted} asked for>",
        "the system does not pin so much",
        f"solve the policy again {remedy}, or with a lower --cpu-memory",
    )
