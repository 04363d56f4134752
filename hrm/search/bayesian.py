"""Bayesian search on the simulated throughput, which has no closed form, by Optuna.

A trial's parameters are shares of what fits the machine, so that hardly any trial is wasted. First
come policies that fill the memories, then in turn what Optuna's tree-structured Parzen estimator
proposes and small changes of the best of each kind. What cannot win by its closed form is not
simulated. The study can be kept in a file or a database: it is found again by a hash of everything
that is fixed, and several processes can share it.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, ClassVar, Final, final

import msgspec

from hrm.estimate import Estimate
from hrm.policy import Policy
from hrm.search.constraints import may_meet
from hrm.search.exhaustive import greatest
from hrm.search.scores import bound_of, score_of
from hrm.search.shares import Decoder, Parameters
from hrm.search.solver import Found, Solver
from hrm.search.space import KvPlace, Space

if TYPE_CHECKING:
    import optuna

LOCAL: Final = 4  # of so many trials one is what the estimator proposes
ENCODING: Final = 4  # of parameters; a study of another one is never resumed
BOUND_MARGIN: Final = 1.05  # the bound leaves out, as a rule by far less, what may be quicker
_ATTEMPTS: Final = 30  # to change a policy into one that was not tried and may win
_PROMISING: Final = 10  # of which the one with the highest closed form is tried

Progress = Callable[[int, float], None]


@final
@dataclass(frozen=True)
class Optuna(Solver):
    """The highest simulated throughput after so many more `trials`.

    `storage` is the path of a journal file, or a database's URL (`sqlite:///trials.db`); without
    it nothing is kept. Ctrl-C ends the search with the best so far. `progress` is called after
    every trial with their number and the best throughput.
    """

    trials: int = 200
    storage: str | None = None
    seed: int = 0
    progress: Progress | None = None

    name: ClassVar[str] = "optuna"
    evaluates: ClassVar[str] = "trials in the study"

    def find(self, space: Space) -> Found:
        """The best of all trials in the study; PolicyError if the storage cannot be used."""
        decoder = Decoder(space)
        if not decoder.kinds:
            return Found()
        study = _open_study(space, self.storage, self.seed)
        trying = Trying(decoder, study, self.storage, trials=self.trials, seed=self.seed)
        interrupted = False
        try:
            for number in range(self.trials):
                trying.try_one(local=number % LOCAL > 0)
                if self.progress is not None:
                    self.progress(number + 1, trying.best_tokens_per_s())
        except KeyboardInterrupt:
            if not trying.best_tokens_per_s():
                raise
            interrupted = True
        best = next(trying.ranked(), None) or trying.filling()
        return Found(
            ranked=() if best is None else (best,),
            more=trying.ranked,
            greatest_tokens_per_s=max(score_of(space, best.policy) if best else 0.0, greatest(space)),
            evaluations=len(trying.finished()),
            simulated=len(trying.simulated),
            interrupted=interrupted,
        )


class Trying:
    """A study, kept in `storage`, with what this process knows of it."""

    def __init__(self, decoder: Decoder, study: "optuna.Study", storage: str | None, *, trials: int, seed: int) -> None:
        self.decoder, self.study, self.storage = decoder, study, storage
        self.simulated: dict[Policy, Estimate] = {}
        self._known: dict[Policy, tuple[float, float]] = {}
        with self._told():
            known = len(study.trials)
        self.random = Random(f"{seed} {known}")
        for parameters in [] if known else decoder.first(trials // 3):
            with self._told():
                study.enqueue_trial(parameters, skip_if_exists=True)

    def try_one(self, *, local: bool) -> None:
        """One more trial: what is queued, else near a good one if `local`, else the sampler's."""
        import optuna

        state = optuna.trial.TrialState
        if local and not self._trials(state.WAITING):
            self._enqueue_change()
        with self._told():
            trial = self.study.ask()
        try:
            with self._told():
                parameters = _asked(self.decoder, trial)
            policy = self.decoder.policy(parameters)
            predicted = self._simulate(policy) if policy and self._may_win(policy) else None
            if predicted is not None and not self.decoder.space.limits.are_met(predicted.latency):
                predicted = None
            with self._told():
                if predicted is None:
                    self.study.tell(trial, state=state.PRUNED)
                else:
                    self.study.tell(trial, predicted.tokens_per_s)
        except KeyboardInterrupt:
            with self._told():
                self.study.tell(trial, state=state.FAIL)
            raise

    def finished(self) -> "list[optuna.trial.FrozenTrial]":
        """All trials of the study that can be used, whoever tried them, best first."""
        import optuna

        complete = self._trials(optuna.trial.TrialState.COMPLETE)
        usable = [trial for trial in complete if self._is_usable(trial)]
        return sorted(usable, key=lambda trial: -(trial.value or 0.0))

    def _trials(self, state: "optuna.trial.TrialState") -> "list[optuna.trial.FrozenTrial]":
        with self._told():
            return self.study.get_trials(deepcopy=False, states=(state,))

    def _told(self) -> AbstractContextManager[None]:
        """What Optuna raises within is told as a mistake with the storage."""
        from hrm.search.study_file import told

        return told(self.storage)

    def _is_usable(self, trial: "optuna.trial.FrozenTrial") -> bool:
        """Whether value and parameters are some that this search could have written."""
        given, values = self._parameters(trial), trial.values or [None]
        shares = [given.get(name) for name in ("size", "number", "kv", "residents", "chunk")]
        return (
            all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in shares)
            and all(isinstance(x, (int, float)) and 0 <= x < math.inf for x in values)
            and (given.get("kind") in self.decoder.kinds)
            and (given.get("dense") in self.decoder.dense)
            and (given.get("prefill") in self.decoder.prefill)
        )

    def best_tokens_per_s(self) -> float:
        """The best throughput so far; 0 if there is none."""
        finished = self.finished()
        return (finished[0].value or 0.0) if finished else 0.0

    def ranked(self) -> Iterator[Estimate]:
        """The best policies, each of another number of micro-batches."""
        numbers: set[int] = set()
        for trial in self.finished():
            policy = self.decoder.policy(self._parameters(trial))
            if policy is not None and policy.num_micro_batches not in numbers:
                numbers.add(policy.num_micro_batches)
                yield self._simulate(policy)

    def filling(self) -> Estimate | None:
        """A policy that fills the memories, where no trial has found one; None if it misses the limits."""
        policies = map(self.decoder.policy, self.decoder.first(1))
        found = [self._simulate(policy) for policy in policies if policy is not None]
        return next((each for each in found if self.decoder.space.limits.are_met(each.latency)), None)

    def _enqueue_change(self) -> None:
        """A small change of the best policy of one kind, mostly of the best kinds.

        Of a few that may win, the one with the highest closed form.
        """
        best_of_kinds: dict[str, Parameters] = {}
        for trial in self.finished():
            best_of_kinds.setdefault(trial.params["kind"], self._parameters(trial))
        promising: dict[float, Parameters] = {}
        for _ in range(_ATTEMPTS if best_of_kinds else 0):
            rank = min(int(self.random.expovariate(0.5)), len(best_of_kinds) - 1)
            changed = self.decoder.changed(list(best_of_kinds.values())[rank], self.random)
            policy = self.decoder.policy(changed)
            if policy is not None and policy not in self.simulated and self._may_win(policy):
                promising[self._closed_form(policy)[1]] = changed
            if len(promising) == _PROMISING:
                break
        if promising:
            with self._told():
                self.study.enqueue_trial(promising[max(promising)])

    def _may_win(self, policy: Policy) -> bool:
        """Whether it was simulated, or its closed form leaves a chance to beat the best so far."""
        if policy in self.simulated:
            return True
        bound = BOUND_MARGIN * self._closed_form(policy)[0]
        return bound > self.best_tokens_per_s() and may_meet(self.decoder.space, policy)

    def _closed_form(self, policy: Policy) -> tuple[float, float]:
        """Bound and score of a policy, worked out once."""
        if policy not in self._known:
            space = self.decoder.space
            self._known[policy] = bound_of(space, policy), score_of(space, policy)
        return self._known[policy]

    def _parameters(self, trial: "optuna.trial.FrozenTrial") -> Parameters:
        return {"kv": 0.5, "residents": 1.0, "prefill": self.decoder.prefill[0], **trial.params}

    def _simulate(self, policy: Policy) -> Estimate:
        if policy not in self.simulated:
            self.simulated[policy] = self.decoder.space.predicted(policy)
        return self.simulated[policy]


def _asked(decoder: Decoder, trial: "optuna.Trial") -> Parameters:
    """The parameters of a trial, as its sampler suggests them."""
    name = trial.suggest_categorical("kind", list(decoder.kinds))
    kind = decoder.kinds[name]
    return {
        "kind": name,
        "size": trial.suggest_float("size", 0, 1),
        "number": trial.suggest_float("number", 0, 1),
        "kv": trial.suggest_float("kv", 0, 1) if kind.kv is KvPlace.SOME else 0.5,
        "residents": 1.0 if kind.gpu_ffn else trial.suggest_float("residents", 0, 1),
        "chunk": trial.suggest_float("chunk", 0, 1),
        "dense": trial.suggest_categorical("dense", decoder.dense),
        "prefill": decoder.prefill[0] if kind.gpu_ffn else trial.suggest_categorical("prefill", decoder.prefill),
    }


def study_name(space: Space) -> str:
    """The name of the study of a space: a hash of all that is fixed, whatever is known of other spaces."""
    asked = replace(space, known_tokens_per_s=0.0, kinds_left=None)
    fixed = msgspec.json.encode((ENCODING, asked), order="sorted")
    return f"hrm-{hashlib.sha256(fixed).hexdigest()[:16]}"


def _open_study(space: Space, storage: str | None, seed: int) -> "optuna.Study":
    import optuna
    from optuna.storages import JournalStorage

    from hrm.search.study_file import StudyFile, told

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with told(storage):
        if storage is None or "://" in storage:
            kept = storage
        else:
            kept = JournalStorage(StudyFile(storage))
        study = optuna.create_study(
            study_name=study_name(space), storage=kept, load_if_exists=True, direction="maximize"
        )
        # Whoever joins later proposes other policies.
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study
