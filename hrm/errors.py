"""What the user can get wrong, told in one line: where, which value, the rule, the remedy.

A broken invariant of ours is an `assert`, never one of these.
"""


class HrmError(ValueError):
    """A mistake in the user's input; command lines print it and exit with code 2.

    `where` names the file and field (`policy.json: micro_batch_size`), `rule` what must hold and
    `remedy` what to do about it.
    """

    def __init__(self, where: str, value: object, rule: str, remedy: str) -> None:
        """Compose the one-line message `where is value: rule; remedy`."""
        self.where, self.value, self.rule, self.remedy = where, value, rule, remedy
        shown = value if isinstance(value, str) and value.startswith("<") else repr(value)
        super().__init__(f"{where} is {shown}: {rule}; {remedy}")


class UnitError(HrmError):
    """A size, rate or duration that cannot be read."""


class ProfileError(HrmError):
    """A hardware profile, GPU or host file that cannot be used."""


class ModelError(HrmError):
    """A model name or `config.json` that cannot be used."""


class WorkloadError(HrmError):
    """Impossible prompt or generation lengths, or an unknown workload."""


class PolicyError(HrmError):
    """A policy that is malformed, inconsistent or does not fit the machine."""


class TraceError(HrmError):
    """A trace or run directory that cannot be read."""
