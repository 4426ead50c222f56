"""Which trial comes next: those that are listed, in order, then those that studies choose as rows arrive. No torch."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raysweep.config.expansion import PlannedTrial, Sampled
from raysweep.config.sections import SearchConfig
from raysweep.config.studies import Study
from raysweep.config.trial import Trial
from raysweep.errors import UsageError
from raysweep.fingerprint import fingerprint
from raysweep.sweep.identified import SweepTrial

if TYPE_CHECKING:
    import optuna

Row = Mapping[str, Any]
Chosen = dict[str, tuple[dict[str, Any], Row]]
"""Trials that a study chose, by trial_id: the values of its open fields, and the row."""

Identify = Callable[[PlannedTrial, int], SweepTrial]

TRIES, TRIES_OF_LISTS = 100, 10  # for a proposal that has no row yet; of lists alone one can be looked up


class Proposals:
    """The trials of one phase that are still to run.

    rows: of trials that are done, by trial_id;  earlier: those of studies, by the study's number
    total: how many there will be at most
    """

    def __init__(
        self,
        listed: Sequence[SweepTrial],
        studies: Sequence[Study],
        search: SearchConfig,
        identify: Identify,
        first_number: int,
        rows: Mapping[str, Row],
        earlier: Mapping[int, Chosen],
    ) -> None:
        self.rows = rows
        self._listed = list(listed)
        if search.scheduler != "none":  # a ladder in its own order would always promote the next rung of it
            random.Random(search.seed).shuffle(self._listed)
        self._listed.reverse()
        seen = {trial.trial_id for trial in self._listed} | set(rows)
        self._running = [
            RunningStudy(study, search, identify, earlier[study.number], seen) for study in studies
        ]
        self._number = first_number
        self._of: dict[str, RunningStudy] = {}
        self._ended = False
        self.total = len(self._listed) + sum(study.remaining for study in self._running)

    def next(self) -> SweepTrial | None:
        """The trial that is to run next; None when there is none left."""
        if self._ended:
            return None
        if self._listed:
            return self._listed.pop()
        while open_studies := [study for study in self._running if study.remaining]:
            study = max(open_studies, key=lambda one: one.remaining)  # so that all cells go on side by side
            trial = study.propose(self._number)
            if trial is not None:
                self._number += 1
                self._of[trial.trial_id] = study
                return trial
        return None

    def end(self) -> None:
        """Proposes nothing more."""
        self._ended = True

    def done(self, trial: SweepTrial, row: Row | None) -> None:
        """Tells the study that chose the trial what came of it; None where its process was lost."""
        study = self._of.pop(trial.trial_id, None)
        if study is not None:
            study.tell(trial, row)


class RunningStudy:
    """A study with its optimizer, which has heard of all earlier trials that it chose.

    seen: identities of trials that have rows or are to run, shared by all studies, so that none runs twice
    """

    def __init__(
        self,
        study: Study,
        search: SearchConfig,
        identify: Identify,
        earlier: Chosen,
        seen: set[str],
    ) -> None:
        self._study, self._search, self._identify = study, search, identify
        self._distributions = {name: _distribution(values) for name, values in study.open.items()}
        self._optimizer = _optimizer(search, study)
        self._asked: dict[str, Any] = {}
        for chosen, row in earlier.values():
            self._optimizer.add_trial(self._frozen(chosen, row))
        self._seen = seen
        self.remaining = max(0, study.samples - len(earlier))

    def propose(self, number: int) -> SweepTrial | None:
        """A trial that has no row and is not running; None when none could be found: then the study ends."""
        tries = TRIES_OF_LISTS if self._study.is_finite else TRIES
        return self._asked_for(tries, number) or self._not_yet_seen(number)

    def _asked_for(self, tries: int, number: int) -> SweepTrial | None:
        """The first of so many answers of the optimizer that is new."""
        for _ in range(tries):
            asked = self._optimizer.ask(self._distributions)
            trial = self._new(self._values(asked.params), number)
            if trial is not None:
                self._seen.add(trial.trial_id)
                self._asked[trial.trial_id] = asked
                self.remaining -= 1
                return trial
            self._optimizer.tell(asked, state=_state("FAIL"))  # known already: ask for another
        return None

    def _not_yet_seen(self, number: int) -> SweepTrial | None:
        """A combination of lists that the optimizer does not come to by itself."""
        for chosen in self._study.corner_values():
            if self._new(chosen, number) is not None:
                self._optimizer.enqueue_trial(self._params(chosen))
                return self._asked_for(1, number)
        self.remaining = 0
        return None

    def _new(self, chosen: Mapping[str, Any], number: int) -> SweepTrial | None:
        """The trial with these values, unless it is known or another's."""
        planned = self._study.planned(chosen)
        trial = self._identify(planned, number)
        known = trial.trial_id in self._seen or planned in self._study.excluded
        return None if known else replace(trial, study=self._study.key)

    def tell(self, trial: SweepTrial, row: Row | None) -> None:
        asked, value = self._asked.pop(trial.trial_id), (row or {}).get(self._search.metric)
        if row is not None and row.get("status") == "finished" and value is not None:
            self._optimizer.tell(asked, float(value))
        else:
            stopped = row is not None and row.get("status") == "stopped"
            self._optimizer.tell(asked, state=_state("PRUNED" if stopped else "FAIL"))

    def _values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Of the open fields; choices are known to the optimizer by their place in the list."""
        values: dict[str, Any] = {}
        for name, values_of_field in self._study.open.items():
            choices = _choices(values_of_field)
            values[name] = params[name] if choices is None else choices[params[name]]
        return values

    def _params(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The reverse of `_values`."""
        params: dict[str, Any] = {}
        for name, values_of_field in self._study.open.items():
            choices = _choices(values_of_field)
            params[name] = chosen[name] if choices is None else choices.index(chosen[name])
        return params

    def _frozen(self, chosen: Mapping[str, Any], row: Row) -> optuna.trial.FrozenTrial:
        from optuna.trial import create_trial

        value = row.get(self._search.metric)
        finished = row.get("status") == "finished" and value is not None
        return create_trial(
            params=self._params(chosen),
            distributions=self._distributions,
            value=float(str(value)) if finished else None,
            state=_state("COMPLETE" if finished else "PRUNED" if row.get("status") == "stopped" else "FAIL"),
        )


def chosen_by(study: Study, identify: Identify, rows: Mapping[str, Row]) -> Chosen:
    """The rows of trials that a study chose, at most as many as it has samples."""
    found: Chosen = {}
    mine = {trial_id: row for trial_id, row in rows.items() if row.get("study") == study.key}
    for trial_id, row in mine.items():
        if len(found) == study.samples:
            break
        try:
            trial = Trial.from_columns(dict(row))
        except (UsageError, ValueError):  # of another version, perhaps
            continue
        chosen = study.chosen(trial)
        if chosen is None:
            continue
        planned = study.planned(chosen)
        if planned not in study.excluded and identify(planned, 0).trial_id == trial_id:
            found[trial_id] = (chosen, row)
    return found


def _choices(values: tuple[Any, ...] | Sampled) -> tuple[Any, ...] | None:
    """The listed values of a field; None where it is drawn from an interval."""
    if not isinstance(values, Sampled):
        return values
    return values.values if values.kind == "choice" else None


def _distribution(values: tuple[Any, ...] | Sampled) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    choices = _choices(values)
    if choices is not None:
        return CategoricalDistribution(range(len(choices)))
    assert isinstance(values, Sampled)
    low, high = values.values
    return FloatDistribution(low, high, log=values.kind == "loguniform")


def _optimizer(search: SearchConfig, study: Study) -> optuna.Study:
    """TPE (arXiv 2304.11127), whose draws depend on the search's seed and the study's cell alone."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    cell = {name: str(value) for name, value in study.fixed.items()}
    seed = int(
        fingerprint({"seed": search.seed, "calibration": study.calibration.seed, "cell": cell})[:8], 16
    )
    return optuna.create_study(
        direction="minimize" if search.mode == "min" else "maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
    )


def _state(name: str) -> optuna.trial.TrialState:
    from optuna.trial import TrialState

    return TrialState[name]
