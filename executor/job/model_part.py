"""What one process has of a model, and what runs it there."""

from dataclasses import dataclass
from typing import final

from executor.backends import computes
from executor.generate import AbstractGenerator, Generator, Prepared
from executor.handlers import EndOfText
from executor.job.machine import files_of_ranks, predicted_seconds
from executor.loading import Loading
from executor.model import Architecture
from executor.null_generator import NullGenerator
from executor.trace_budget import MAX_SPANS
from executor.under_way import Peers
from executor.weight_pages import StoredWeights
from hrm.policy import Parallelism
from hrm.policy_file import PolicyFile


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPart:
    """A model whole, or what one of several ranks has of it: its architecture, and its own policy file.

    `stored` are all weights of the whole.
    """

    stored: StoredWeights
    arch: Architecture
    policy_file: PolicyFile

    @staticmethod
    def of(stored: StoredWeights, whole: Architecture, policy_file: PolicyFile, rank: int = 0) -> "ModelPart":
        """What that rank has of a whole model under a policy, see `files_of_ranks`."""
        files, arch = files_of_ranks(policy_file), whole
        if files[0] is not policy_file and policy_file.policy.parallelism is Parallelism.PIPELINE:
            arch = whole.of_stage(files[rank].model, sum(before.model.num_layers for before in files[:rank]))
        elif len(files) > 1:
            arch = whole.of_rank(rank, files[rank].model)
        return ModelPart(stored=stored, arch=arch, policy_file=files[rank])

    def generator(
        self,
        prepared: Prepared,
        loading: Loading | None = None,
        *,
        stops: EndOfText | None = None,
        peers: Peers | None = None,
        max_spans: int = MAX_SPANS,
    ) -> AbstractGenerator:
        """What runs batches in this process, with its weights loaded, together with its `peers`.

        Where nothing is computed, it sleeps as long as is predicted of this part. At most so many spans are kept.
        """
        if not computes(prepared.backend.name):
            seconds_of = predicted_seconds(self.policy_file, prepared.planned.policy)
            return NullGenerator(prepared.backend, self.arch, prepared.planned, seconds_of, max_spans)
        return Generator(
            prepared, self.arch, self.stored, stops=stops, loading=loading, peers=peers, max_spans=max_spans
        )
