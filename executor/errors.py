"""What the user can get wrong when running a model; see hrm.errors for the rules."""

from hrm.errors import HrmError


class CheckpointError(HrmError):
    """A checkpoint folder, one of its files or one of its tensors that cannot be used."""


class JobError(HrmError):
    """A request or an output directory that cannot be used."""


class RunError(HrmError):
    """A run that cannot start or go on."""
