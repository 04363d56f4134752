"""Weight pages, and parts of experts, on their way to the GPU."""

from collections.abc import Callable, Sequence
from typing import final

from torch import Tensor

from executor.backends import AbstractBackend
from executor.lanes import Handler
from executor.weight_pages import WeightPages, page_slice
from hrm.acts.pages import STAGING, WEIGHTS
from hrm.acts.parts import PARTS
from hrm.schedules import Pipeline
from hrm.tasks import Act, Lane, Task


@final
class PageHandlers:
    """Moves weight pages and parts of experts; the same in both phases.

    `streamed` says how many bytes of each layer the phase streams whole.
    """

    def __init__(
        self,
        backend: AbstractBackend,
        weights: WeightPages,
        pipeline: Pipeline,
        streamed: Sequence[int],
        idle: Callable[[], bool],
    ) -> None:
        self._backend, self._weights, self._pipeline = backend, weights, pipeline
        self._streamed, self._idle = streamed, idle

    def by_act(self) -> dict[Act, Handler]:
        """The handler of every act that moves weights in the pipeline's phase."""
        (stage, load), load_part, _ = self._pipeline.weight_acts
        return {stage: self.stage, load: self.load, load_part: self.load_part}

    def stage(self, x: Task) -> int:
        """STAGE_PAGE: copy a page into pinned memory."""
        if self._idle():
            return 0
        page = self._page(x)
        source = self._weights.on_host(x.id.layer, page)
        return self._backend.transfer(Lane.STAGE, [(self._pinned(x, page), source)])

    def load(self, x: Task) -> int:
        """LOAD_PAGE: move a page into its slot on the GPU."""
        if self._idle():
            return 0
        page = self._page(x)
        if self._pipeline.staging:
            source = self._pinned(x, page)
        else:
            source = self._weights.on_host(x.id.layer, page)
        return self._backend.transfer(Lane.H2D, [(self._weights.in_slot(x.slot(WEIGHTS), page), source)])

    def load_part(self, x: Task) -> int:
        """LOAD_PART: move a part of a layer's experts into its slot on the GPU."""
        if self._idle():
            return 0
        part = self._weights.part(x.id.layer, x.id.index % self._pipeline.parts_of(x.id.layer))
        return self._backend.transfer(Lane.H2D, [(part.slots[x.slot(PARTS)], part.on_host)])

    def _page(self, x: Task) -> slice:
        return page_slice(self._streamed[x.id.layer], self._pipeline.num_pages, x.id.index, self._weights.dtype)

    def _pinned(self, x: Task, page: slice) -> Tensor:
        return self._weights.staged(x.slot(STAGING), page)
