"""A model with the weights that it is run on: a checkpoint's, or random ones in a published shape."""

from typing import NamedTuple

from executor.checkpoint import Checkpoint, WeightSource
from executor.families import Family, family_for
from executor.model import Architecture
from executor.random_weights import RandomWeights
from hrm.model_spec import ModelSpec


class ModelWeights(NamedTuple):
    """A family, where its weights are read, and the architecture that they are for."""

    family: Family
    source: WeightSource
    arch: Architecture

    @staticmethod
    def of_checkpoint(checkpoint: Checkpoint) -> "ModelWeights":
        """Those of a checkpoint that is open; CheckpointError if its config is of no family or lacks something."""
        family = family_for(checkpoint.config, checkpoint.config_path)
        return ModelWeights(family, checkpoint, family.architecture(checkpoint.config, checkpoint.config_path))

    @staticmethod
    def random(spec: ModelSpec, seed: int) -> "ModelWeights":
        """Random numbers in the shape of a model, equal for equal seeds; CheckpointError if no family runs it."""
        family = family_for({"model_type": spec.family}, f"--model {spec.name}")
        return ModelWeights(family, RandomWeights(seed), family.published_architecture(spec))

    def cut(self, num_layers: int) -> "ModelWeights":
        """Those of its first layers, of which there are so many at least."""
        return self._replace(arch=self.arch.first_layers(num_layers))
