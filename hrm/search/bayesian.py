"""Bayesian search on the simulated throughput, which has no closed form, by Optuna.

A trial's parameters are shares of what fits the machine, so that hardly any trial is wasted. First
come policies that fill the memories, then in turn what Optuna's tree-structured Parzen estimator
proposes and small changes of the best of each kind. What cannot win by its closed form is not
simulated. The study can be kept in a file or a database: it is found again by a hash of everything
that is fixed, and several processes can share it.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from hrm.estimate import Estimate, estimate
from hrm.policy import Policy
from hrm.search.exhaustive import RUNNER_UPS, greatest
from hrm.search.fit import Ints
from hrm.search.grid import ALL_THAT_FIT, Grid, make_grid
from hrm.search.lattice import chunk_ranges, levelled, limits
from hrm.search.result import Outcome, SearchResult
from hrm.search.scores import bound_of, score_of
from hrm.search.space import Kind, KvPlace, Space

if TYPE_CHECKING:
    import optuna

DEFAULT_TRIALS: Final = 200
LOCAL: Final = 4  # of so many trials one is what the estimator proposes
CHUNK_STEP: Final = 1.1  # between one chunk that is tried and the next
ENCODING: Final = 3  # of parameters; a study of another one is never resumed
# To begin with: sizes and numbers of micro-batches, as logarithmic shares of what fits, and chunks
# in lengths of the longest prompt.
_FILLING: Final = ((1.0, 0.0, 4), (1.0, 1.0, 1), (1.0, 0.0, 64), (1.0, 1.0, 16), (0.5, 0.5, 4), (0.0, 1.0, 1))
_RESIDENT: Final = (1.0, 0.5)  # shares of the experts that stay beside one micro-batch
_STEPS: Final = (0.02, 0.1, 0.3)  # by which shares are changed
_ATTEMPTS: Final = 30  # to change a policy into one that was not tried and may win
BOUND_MARGIN: Final = 1.05  # the bound leaves out, as a rule by far less, what may be quicker
_PROMISING: Final = 10  # of which the one with the highest closed form is tried

Parameters = dict[str, Any]
Progress = Callable[[int, float], None]


def search_space(
    space: Space,
    *,
    trials: int = DEFAULT_TRIALS,
    storage: str | None = None,
    seed: int = 0,
    runner_ups: int = RUNNER_UPS,
    progress: Progress | None = None,
) -> SearchResult:
    """The policy with the highest simulated job throughput after `trials` more trials.

    `storage` is the path of a journal file, or a database's URL (`sqlite:///trials.db`); without
    it nothing is kept. Ctrl-C ends the search with the best so far. `progress` is called after
    every trial with their number and the best throughput. Raises PolicyError if the storage cannot
    be used.
    """
    started_s = time.perf_counter()
    decoder = Decoder(space)
    if not decoder.kinds:
        return SearchResult(
            solver="optuna",
            outcome=Outcome.INFEASIBLE,
            best=None,
            runner_ups=(),
            greatest_tokens_per_s=0.0,
            evaluations=0,
            seconds=time.perf_counter() - started_s,
            simulated=0,
        )
    study = _open_study(space, storage, seed)
    trying = Trying(decoder, study, storage, trials=trials, seed=seed)
    interrupted = False
    try:
        for number in range(trials):
            trying.try_one(local=number % LOCAL > 0)
            if progress is not None:
                progress(number + 1, trying.best_tokens_per_s())
    except KeyboardInterrupt:
        if not trying.best_tokens_per_s():
            raise
        interrupted = True
    ranked = trying.ranked(runner_ups + 1) or trying.filling()
    best = ranked[0]
    score = score_of(space, best.policy)
    highest = max(score, greatest(space))
    return SearchResult(
        solver="optuna",
        outcome=Outcome.INTERRUPTED if interrupted else Outcome.BEST_FOUND,
        best=best,
        runner_ups=tuple(ranked[1:]),
        greatest_tokens_per_s=highest,
        evaluations=len(trying.finished()),
        seconds=time.perf_counter() - started_s,
        simulated=len(trying.simulated),
    )


@dataclass(frozen=True, slots=True)
class Setting:
    """What limits sizes and numbers beside one another."""

    kind: Kind
    chunk: int
    dense: bool


class Decoder:
    """Turns shares of what fits into policies."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.dense = (True, False) if space.profile.has_accelerator else (True,)
        self.chunks = sorted(c for some in chunk_ranges(space) for c in some.spaced(CHUNK_STEP))
        self._known: dict[tuple[Setting, int], int] = {}
        self.kinds = {
            name: kind
            for name, kind in ((_name(kind), kind) for kind in space.kinds())
            if any(self._most_sizes(Setting(kind, self.chunks[0], dense)) for dense in self.dense)
        }

    def first(self, count: int) -> list[Parameters]:
        """Policies that fill the memories in some way, those of the highest closed form."""
        scored: dict[Policy, tuple[float, Parameters]] = {}
        for parameters in self._filling():
            policy = self.policy(parameters)
            if policy is not None and policy not in scored:
                scored[policy] = score_of(self.space, policy), parameters
        ranked = sorted(scored.values(), key=lambda pair: -pair[0])
        return [parameters for _, parameters in ranked[:count]]

    def _filling(self) -> Iterator[Parameters]:
        for size, number, chunk in _FILLING:
            share = self._chunk_share(chunk)
            for name, kind in self.kinds.items():
                for residents in (1.0,) if kind.gpu_ffn else (1.0, 0.0):
                    yield {
                        "kind": name,
                        "size": size,
                        "number": number,
                        "kv": 0.5,
                        "residents": residents,
                        "chunk": share,
                        "dense": True,
                    }
        for share in _RESIDENT:
            for name, kind in self.kinds.items():
                yield {
                    "kind": name,
                    "size": self._share_with_residents(kind, share),
                    "number": 0.0,
                    "kv": 0.5,
                    "residents": 1.0,
                    "chunk": 0.0,
                    "dense": True,
                }

    def _chunk_share(self, prompts: int) -> float:
        """The longest chunk of no more than so many of the longest prompt, as a share."""
        most = prompts * self.space.workload.max_prompt_len
        shorter = sum(chunk <= most for chunk in self.chunks) - 1
        return shorter / max(len(self.chunks) - 1, 1)

    def ask(self, trial: "optuna.Trial") -> Parameters:
        """The parameters of a trial, as its sampler suggests them."""
        name = trial.suggest_categorical("kind", list(self.kinds))
        kind = self.kinds[name]
        return {
            "kind": name,
            "size": trial.suggest_float("size", 0, 1),
            "number": trial.suggest_float("number", 0, 1),
            "kv": trial.suggest_float("kv", 0, 1) if kind.kv is KvPlace.SOME else 0.5,
            "residents": 1.0 if kind.gpu_ffn else trial.suggest_float("residents", 0, 1),
            "chunk": trial.suggest_float("chunk", 0, 1),
            "dense": trial.suggest_categorical("dense", self.dense),
        }

    def policy(self, parameters: Parameters) -> Policy | None:
        """The policy that the parameters mean; None if even the least of its kind does not fit."""
        kind = self.kinds[parameters["kind"]]
        longest = round(parameters["chunk"] * (len(self.chunks) - 1))
        settings = (Setting(kind, chunk, parameters["dense"]) for chunk in reversed(self.chunks[: longest + 1]))
        setting = next((setting for setting in settings if self._most_sizes(setting)), None)
        if setting is None:
            return None
        size = _logarithmic(parameters["size"], self._most_sizes(setting))
        most_numbers = self._most_numbers(setting, size)
        if not most_numbers:
            return None
        least = 2 if kind.kv is KvPlace.SOME else 1
        number = max(_logarithmic(parameters["number"], most_numbers), least)
        requests = self.space.workload.num_requests
        ((size, number),) = levelled(np.array([[size, number]]), requests).tolist()
        if number < least:
            return None
        on_gpu = number if kind.kv is KvPlace.ALL else 0
        if kind.kv is KvPlace.SOME:
            most = _largest(number - 1, lambda k: self._fit(setting, size, number, k))
            on_gpu = 1 + round(parameters["kv"] * (most - 1))
        parts = round(parameters["residents"] * ALL_THAT_FIT)
        place = np.array([[size, number, on_gpu, parts, setting.chunk]])
        grid = make_grid(self.space, kind, place)
        fitting = np.flatnonzero(grid.fits & (grid.resident_dense == setting.dense))
        return grid.policy(self.space, int(fitting[0])) if len(fitting) else None

    def changed(self, parameters: Parameters, random: Random) -> Parameters:
        """The parameters with some of them changed, mostly a little."""
        changed, step = dict(parameters), random.gauss(0, random.choice(_STEPS))
        names = random.sample(sorted(changed), random.randint(1, 3))
        steps = {name: random.gauss(0, random.choice(_STEPS)) for name in names}
        if random.random() < 0.2:  # as many requests in fewer or more micro-batches
            steps = {"size": step, "number": -step}
        if random.random() < 0.3:  # far away
            steps = {name: random.uniform(-1, 1) for name in steps}
        for name, moved in steps.items():
            match name:
                case "kind":
                    changed[name] = random.choice(list(self.kinds))
                case "dense":
                    changed[name] = random.choice(self.dense)
                case _:
                    changed[name] = min(max(changed[name] + moved, 0.0), 1.0)
        return changed

    def _share_with_residents(self, kind: Kind, share: float) -> float:
        """The size, as a share, of one micro-batch beside which that share of experts fits."""
        setting = Setting(kind, self.chunks[0], dense=True)
        number = 1 + (kind.kv is KvPlace.SOME)

        def fit(sizes: Ints) -> NDArray[np.bool_]:
            grid = self._grid(setting, sizes, number, number * (kind.kv is KvPlace.ALL))
            enough = grid.resident_total >= share * self.space.everything
            return (grid.fits & enough)[grid.resident_dense == setting.dense]

        most = self._most_sizes(setting)
        size = _largest(most, fit)
        return math.log(size) / math.log(most) if size > 1 else 0.0

    def _most_sizes(self, setting: Setting) -> int:
        """The largest micro-batch of which as few fit as the kind allows."""
        if (setting, 0) not in self._known:
            number = 1 + (setting.kind.kv is KvPlace.SOME)
            on_gpu = int(setting.kind.kv is KvPlace.ALL)
            self._known[setting, 0] = _largest(limits(self.space)[0], lambda m: self._fit(setting, m, number, on_gpu))
        return self._known[setting, 0]

    def _most_numbers(self, setting: Setting, size: int) -> int:
        """The most micro-batches of a size that fit."""
        if (setting, size) not in self._known:
            on_gpu = int(setting.kind.kv is KvPlace.ALL)
            self._known[setting, size] = _largest(
                limits(self.space)[1], lambda n: self._fit(setting, size, n, on_gpu * n)
            )
        return self._known[setting, size]

    def _fit(self, setting: Setting, size: Ints | int, number: Ints | int, on_gpu: Ints | int) -> NDArray[np.bool_]:
        grid = self._grid(setting, size, number, on_gpu)
        return grid.fits[grid.resident_dense == setting.dense]

    def _grid(self, setting: Setting, size: Ints | int, number: Ints | int, on_gpu: Ints | int) -> Grid:
        columns = np.broadcast_arrays(np.atleast_1d(size), number, on_gpu, ALL_THAT_FIT, setting.chunk)
        return make_grid(self.space, setting.kind, np.column_stack(columns))


def _name(kind: Kind) -> str:
    devices = ("cpu", "gpu")
    return (
        f"attention on {devices[kind.gpu_attention]}, experts on {devices[kind.gpu_ffn]}, "
        f"{kind.kv.name.lower()} of the KV cache on gpu"
    )


def _logarithmic(share: float, most: int) -> int:
    """An integer from 1 to `most`, at a share of the way in the logarithm; 0 if there is none."""
    return round(most**share) if most else 0


def _largest(limit: int, fit: Callable[[Ints], NDArray[np.bool_]]) -> int:
    """The largest integer up to `limit` that fits if all smaller ones do; 0 if 1 does not."""
    if limit < 1:
        return 0
    values = np.unique(np.rint(np.geomspace(1, limit, 48)).astype(np.int64))
    while True:
        fitting = int(np.argmin(np.append(fit(values), False)))
        if fitting == 0:
            return 0
        low = int(values[fitting - 1])
        if fitting == len(values) or values[fitting] == low + 1:
            return low
        values = np.unique(np.rint(np.linspace(low, values[fitting], 48)).astype(np.int64))


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
                parameters = self.decoder.ask(trial)
            policy = self.decoder.policy(parameters)
            wins = policy is not None and self._may_win(policy)
            tokens_per_s = self._simulate(policy).tokens_per_s if policy and wins else None
            with self._told():
                self.study.tell(trial, tokens_per_s, state=None if wins else state.PRUNED)
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
        )

    def best_tokens_per_s(self) -> float:
        """The best throughput so far; 0 if there is none."""
        finished = self.finished()
        return (finished[0].value or 0.0) if finished else 0.0

    def ranked(self, count: int) -> list[Estimate]:
        """The best policies, each of another number of micro-batches."""
        found: dict[int, Estimate] = {}
        for trial in self.finished():
            policy = self.decoder.policy(self._parameters(trial))
            if policy is not None and policy.num_micro_batches not in found:
                found[policy.num_micro_batches] = self._simulate(policy)
            if len(found) == count:
                break
        return list(found.values())

    def filling(self) -> list[Estimate]:
        """A policy that fills the memories, where no trial has found one."""
        policies = map(self.decoder.policy, self.decoder.first(1))
        return [self._simulate(policy) for policy in policies if policy is not None]

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
        """Whether it was simulated, or its bound leaves a chance to beat the best so far."""
        bound = BOUND_MARGIN * self._closed_form(policy)[0]
        return policy in self.simulated or bound > self.best_tokens_per_s()

    def _closed_form(self, policy: Policy) -> tuple[float, float]:
        """Bound and score of a policy, worked out once."""
        if policy not in self._known:
            space = self.decoder.space
            self._known[policy] = bound_of(space, policy), score_of(space, policy)
        return self._known[policy]

    def _parameters(self, trial: "optuna.trial.FrozenTrial") -> Parameters:
        return {"kv": 0.5, "residents": 1.0, **trial.params}

    def _simulate(self, policy: Policy) -> Estimate:
        space = self.decoder.space
        if policy not in self.simulated:
            predicted = estimate(space.spec, policy, space.profile, space.workload)
            self.simulated[policy] = predicted
        return self.simulated[policy]


def study_name(space: Space) -> str:
    """The name of the study of a space: a hash of all that is fixed."""
    fixed = msgspec.json.encode((ENCODING, space), order="sorted")
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
