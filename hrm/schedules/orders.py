"""The orders in which tasks are issued: each is one generator over steps, layers, micro-batches.

Decode orders follow MoE-Lightning's Fig. 6 and Algorithm 1 (arXiv 2411.11217, §4.1).
"""

from collections.abc import Iterator
from typing import Final

from hrm.acts import prefill as acts
from hrm.numeric import N
from hrm.schedules.pipeline import Pipeline
from hrm.tasks import TaskId

_LOOKAHEAD: Final = 2  # micro-batches that CPU attention is launched ahead (Algorithm 1)
_OF_MANY: Final = 32  # micro-batches, of which twice as many are launched ahead


def lookahead(num_micro_batches: N) -> N:
    """How many micro-batches CGOPipe launches attention ahead, of one policy or of a grid of them.

    The paper has two. With more of them no lane waits where attention takes as long as the GPU does for several, or
    where tasks take longer at times; but the next layer's projections have to be there so much earlier, which costs
    next to nothing among many micro-batches only.
    """
    return _LOOKAHEAD * (1 + 1 * (num_micro_batches >= _OF_MANY))


def prefill(p: Pipeline) -> Iterator[TaskId]:
    """Layer by layer, chunk by chunk; the next layer's pages spread between the chunks.

    A layer's chunks run in order, as the parts of a split prompt need. In the last layer a result
    from the CPU's experts is fetched one chunk later, behind the next hidden load.
    """
    n = p.num_micro_batches
    lag = int(p.cpu_experts[-1] and n > 1)
    yield from p.load_pages((0, 0))
    pages = [p.page_slice(g) for g in range(n)]
    for i in range(p.num_layers):
        for g in range(n):
            yield TaskId(acts.EMBED if i == 0 else acts.LOAD_HIDDEN, i, g)
            yield from p.load_pages(p.next_layer(0, i), *pages[g])
            yield from p.prefill_layer(i, g)
            if not p.kv_on_gpu[g]:
                yield TaskId(acts.STORE_KV, i, g)
            if p.cpu_experts[i]:
                yield TaskId(acts.OFFLOAD_TOKENS, i, g)
            if i < p.num_layers - 1:
                yield TaskId(acts.STORE_HIDDEN, i, g)
            if p.cpu_experts[i]:
                yield TaskId(acts.CPU_EXPERTS, i, g)
            if i == p.num_layers - 1 and g >= lag:
                yield from p.end_prefill(g - lag)
    if lag:
        yield from p.end_prefill(n - 1)


def cgopipe(p: Pipeline) -> Iterator[TaskId]:
    """CGOPipe: attention launched ahead, one weight page after each hidden load.

    With one page a layer this is FastDecode's order (S2): the layer's weights move whole, right
    after the first hidden load, and the other hidden loads queue behind them.
    """
    layers, n = p.num_layers, p.num_micro_batches
    total = p.num_steps * layers * n
    # A result from the CPU's experts is fetched one micro-batch later, behind the next hidden load.
    lag = 1 if any(p.cpu_experts) and n > 1 else 0
    ahead = min(lookahead(n), n - lag)

    def enter(position: int) -> Iterator[TaskId]:
        if position < total:
            t, i, j = position // (layers * n), position // n % layers, position % n
            yield from p.prefetch_kv(t, i, j)
            yield from p.embed(t, i, j)
            yield from p.before_attention(t, i, j)
            yield from p.attend(t, i, j)

    def leave(position: int) -> Iterator[TaskId]:
        if 0 <= position < total:
            t, i, j = position // (layers * n), position // n % layers, position % n
            yield from p.finish_layer(t, i, j)

    pages = [p.page_slice(j, lookahead=ahead) if p.num_pages > 1 else (0, int(j == 0)) for j in range(n)]
    yield from p.load_pages((0, 0))
    for position in range(ahead):
        yield from enter(position)
    for position in range(total + lag):
        if position < total:
            t, i, j = position // (layers * n), position // n % layers, position % n
            yield from p.load_hidden(t, i, j)
            yield from p.load_pages(p.next_layer(t, i), *pages[j])
            yield from p.after_attention(t, i, j)
        yield from leave(position - lag)
        if position < total:
            yield from enter(position + ahead)


def flexgen(p: Pipeline) -> Iterator[TaskId]:
    """FlexGen: one micro-batch at a time, the next layer's weights whole and first in the queue.

    With attention on the GPU (S4) the next micro-batch's KV cache is prefetched during the
    current one; with attention on the CPU (S3) nothing of a layer overlaps with it. A step's token
    embeddings are ahead of all its weights, as FlexGen fetches a layer's input a turn before it.
    """
    yield from p.load_pages((0, 0))
    for t in range(p.num_steps):
        for i in range(p.num_layers):
            for j in range(p.num_micro_batches):
                yield from p.embed(t, i, j)
            yield from p.load_pages(p.next_layer(t, i))
            yield from p.prefetch_kv(t, i, 0)
            for j in range(p.num_micro_batches):
                if j + 1 < p.num_micro_batches:
                    yield from p.prefetch_kv(t, i, j + 1)
                yield from p.before_attention(t, i, j)
                yield from p.attend(t, i, j)
                yield from p.load_hidden(t, i, j)
                yield from p.after_attention(t, i, j)
                yield from p.finish_layer(t, i, j)


def deepspeed(p: Pipeline) -> Iterator[TaskId]:
    """DeepSpeed ZeRO-Inference: the batch as one, a layer's stages one after the other."""
    micro_batches = range(p.num_micro_batches)
    yield from p.load_pages((0, 0))
    for t in range(p.num_steps):
        for i in range(p.num_layers):
            for j in micro_batches:
                yield from p.embed(t, i, j)
            yield from p.load_pages(p.next_layer(t, i))
            for j in micro_batches:
                yield from p.before_attention(t, i, j)
            for j in micro_batches:
                yield from p.prefetch_kv(t, i, j)
                yield from p.attend(t, i, j)
            for j in micro_batches:
                yield from p.load_hidden(t, i, j)
                yield from p.after_attention(t, i, j)
            for j in micro_batches:
                yield from p.finish_layer(t, i, j)
