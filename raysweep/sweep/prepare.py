"""Reads all that a sweep needs before anything starts, and refuses what cannot work: models, text, shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.config.calibration import CalibrationConfig
from raysweep.config.expansion import PlannedTrial
from raysweep.config.sections import ModelConfig, PerplexityConfig, ValidationConfig
from raysweep.config.space import SearchSpace
from raysweep.config.studies import Study
from raysweep.config.trial import Trial
from raysweep.errors import UsageError
from raysweep.fingerprint import recovery_id, trial_id
from raysweep.model.checkpoint import ModelSource
from raysweep.model.known_shapes import known_shape
from raysweep.model.known_tokens import KnownTokens
from raysweep.model.shape import ModelShape, model_hash
from raysweep.model.tasks import TaskSet, find_tasks
from raysweep.model.text import TextSource, check_there
from raysweep.model.tokenizer import load_tokenizer
from raysweep.model.tokens import (
    TokenSet,
    calibration_tokens,
    check_vocabulary,
    evaluation_tokens,
    validation_tokens,
)
from raysweep.reconstruction.fitting import check_trial
from raysweep.reconstruction.measures import CALIBRATION, VALIDATION
from raysweep.shards.group_info import EVALUATION_PREFIX
from raysweep.shards.trial import only_pruned
from raysweep.sweep.identified import SweepTrial
from raysweep.sweep.own_criteria import own_criteria

if TYPE_CHECKING:
    from raysweep.pruning.criteria import OwnFunction


@dataclass(frozen=True)
class Phase:
    """Trials that share a calibration set: they run while the shards hold it.

    trials: those that are known before;  studies: which choose others as they go
    """

    calibration: CalibrationConfig
    tokens: TokenSet
    trials: tuple[SweepTrial, ...]
    studies: tuple[Study, ...] = ()


@dataclass(frozen=True)
class PreparedModel:
    """One model of the sweep with its texts and trials, phase by phase. The first phase also holds the dense trial.

    identify: gives a trial of this model its identities, and the number that it is handed
    own_criteria: functions and paths of mask files that users bring along, by the text that names them
    data: what trials are retrained on, by its hash;  tasks: that models are measured on beside the texts
    """

    config: ModelConfig
    source: ModelSource
    shape: ModelShape
    model_hash: str
    dtype: str
    validation: TokenSet | None
    evaluation: dict[str, TokenSet]
    phases: tuple[Phase, ...]
    identify: Callable[[PlannedTrial, int], SweepTrial]
    own_criteria: dict[str, OwnFunction | Path] = field(default_factory=dict)
    data: dict[str, TokenSet] = field(default_factory=dict)
    tasks: TaskSet | None = None

    @property
    def trials(self) -> list[SweepTrial]:
        return [trial for phase in self.phases for trial in phase.trials]

    @property
    def possible(self) -> list[Trial]:
        """The trials that are known, those at the corners of studies, and those that retraining starts from: what
        shards must have room for."""
        corners = (one.trial for phase in self.phases for study in phase.studies for one in study.corners())
        known = [*(trial.trial for trial in self.trials), *corners]
        return list(dict.fromkeys([*known, *(trial.start for trial in known if trial.start is not None)]))

    def texts(self, phase: Phase) -> dict[str, TokenSet]:
        """All texts of a phase by the name under which shards know them; the first evaluation entry comes first."""
        texts = {f"{EVALUATION_PREFIX}{name}": tokens for name, tokens in self.evaluation.items()}
        if self.validation is not None:
            texts[VALIDATION] = self.validation
        return texts | {CALIBRATION: phase.tokens}


def prepare(space: SearchSpace, device: str) -> list[PreparedModel]:
    """Every model of the space with tokens, shapes and identities. Raises UsageError for all that cannot work.

    device: cpu or cuda, which settles `dtype: auto`
    """
    planned, studies = space.expand(), space.studies()
    tasks = _tasks(space)
    prepared, number = [], 0
    for config in space.models:
        mine = [trial for trial in planned if trial.model == config]
        chosen = [study for study in studies if study.model == config]
        prepared.append(_Preparation(space, config, device, tasks).model(mine, chosen, number))
        number += len(mine) + sum(study.samples for study in chosen)
    return prepared


def _tasks(space: SearchSpace) -> TaskSet | None:
    """The tasks of a space. Raises UsageError, with the place, for those that are not there or cannot be read."""
    if not space.evaluation.tasks:
        return None
    try:
        return find_tasks(space.evaluation.tasks, space.evaluation.tasks_include)
    except UsageError as error:
        raise space.placed(error, ("evaluation", "tasks")) from None


class _Preparation:
    """One model's tokenizer, shape and texts."""

    def __init__(
        self, space: SearchSpace, config: ModelConfig, device: str, tasks: TaskSet | None = None
    ) -> None:
        self.space, self.config, self.tasks = space, config, tasks
        self.source = ModelSource(config.path, config.revision, config.trust_remote_code)
        with self._placed("model", "path"):
            self.known = KnownTokens(self.source)
        self._check_files()
        with self._placed("model", "path"):
            self.shape = known_shape(self.source, config.dtype)
        self.dtype = self.shape.dtype_on_cpu if device == "cpu" else self.shape.dtype_on_device
        self.tokenizer = _Lazy(lambda: load_tokenizer(config.path, config.revision, config.trust_remote_code))

    def _check_files(self) -> None:
        """Refuses at once what is not there: reading a model takes seconds."""
        with self._placed("calibration"):
            for source in dict.fromkeys(map(_source_of, self.space.calibrations)):
                check_there(source)
        for place, entry in enumerate(self.space.evaluation.perplexity):
            with self._placed("evaluation", "perplexity", place):
                check_there(_source_of(entry))

    def model(self, planned: list[PlannedTrial], studies: list[Study], first_number: int) -> PreparedModel:
        corners = [corner for study in studies for corner in study.corners()]
        possible = {one.trial: one for one in (*planned, *corners) if not one.trial.is_dense}
        self._check_all(possible)
        criteria = own_criteria(possible)
        for criterion in criteria.values():
            criterion.check(self.shape)
        with self._placed("calibration"):
            calibrations = {config: self._calibration(config) for config in self.space.calibrations}
            _check_distinct(calibrations)
        evaluation = {}
        for place, entry in enumerate(self.space.evaluation.perplexity):
            with self._placed("evaluation", "perplexity", place):
                evaluation[entry.name] = self._evaluation(entry)
        asked_by = {trial.data: one for trial, one in possible.items() if trial.data is not None}
        data = {config: self._retraining_text(config, one) for config, one in asked_by.items()}
        with self._placed("validation"):
            validation = self._validation([*calibrations.values(), *data.values()])
        digest = model_hash(self.source)
        hashes = {f"{EVALUATION_PREFIX}{name}": tokens.content_hash for name, tokens in evaluation.items()}
        if validation is not None:
            hashes[VALIDATION] = validation.content_hash
        if self.tasks is not None:
            hashes |= {f"task/{name}": self.tasks.hashes[name] for name in self.space.tasks_of_all}

        identities = _Identities(
            partial(recovery_id, model_hash=digest, dtype=self.dtype),
            cache(partial(trial_id, protocol=self.space.evaluation_protocol(), text_hashes=hashes)),
            calibrations,
            data,
            {name: own.content_hash for name, own in criteria.items()},
        )
        trials = [identities.of(trial, first_number + place) for place, trial in enumerate(planned)]
        return PreparedModel(
            self.config,
            self.source,
            self.shape,
            digest,
            self.dtype,
            validation,
            evaluation,
            _phases(trials, studies, calibrations),
            identities.of,
            {name: own.for_shards for name, own in criteria.items()},
            {tokens.content_hash: tokens for tokens in (*calibrations.values(), *data.values())},
            self.tasks,
        )

    @contextmanager
    def _placed(self, *path: str | int) -> Iterator[None]:
        """Within the context, errors, which name a setting at most, get file and line of that part of the space."""
        try:
            yield
        except UsageError as error:
            raise self.space.placed(error, path) from None

    def _check_all(self, possible: Mapping[Trial, PlannedTrial]) -> None:
        for trial, one in possible.items():
            try:
                self._check(trial)
            except UsageError as error:
                raise self.space.refusal(one, error) from None

    def _check(self, trial: Trial) -> None:
        check_trial(trial, self.shape.linears, len(self.shape.blocks), self.shape.routed)
        if trial.start is not None:
            try:
                self._check(trial.start)
            except UsageError as error:
                raise error.inside("start_from.") from None

    def _calibration(self, config: CalibrationConfig) -> TokenSet:
        asked: dict[str, Any] = {
            "sampling": config.sampling,
            "num_samples": config.num_samples,
            "sequence_length": config.sequence_length,
            "seed": config.seed,
            "max_positions": self.shape.max_positions,
        }
        source = _source_of(config)
        return self._known(source, asked, lambda: calibration_tokens(self.tokenizer(), source, **asked))

    def _evaluation(self, entry: PerplexityConfig) -> TokenSet:
        source, asked = _windows_of(entry, self.shape)
        return self._known(source, asked, lambda: evaluation_tokens(self.tokenizer(), source, **asked))

    def _retraining_text(self, config: CalibrationConfig, asked_by: PlannedTrial) -> TokenSet:
        """As a calibration set; an error names the trial's group, not the section `calibration`."""
        try:
            return self._calibration(config)
        except UsageError as error:
            raise self.space.refusal(asked_by, error.inside("data.")) from None

    def _validation(self, calibrations: list[TokenSet]) -> TokenSet | None:
        config = self.space.validation
        if not config.samples:
            return None
        asked: dict[str, Any] = {
            "samples": config.samples,
            "sequence_length": self.space.evaluation.perplexity[0].sequence_length,
            "seed": config.seed,
            "max_positions": self.shape.max_positions,
        }
        source = _validation_source(config, self.space.calibrations[0])

        def make() -> TokenSet:
            return validation_tokens(self.tokenizer(), source, exclude=calibrations, **asked)

        return self._known(source, asked, make, calibrations)

    def _known(
        self,
        source: TextSource,
        asked: dict[str, Any],
        make: Callable[[], TokenSet],
        beside: Sequence[TokenSet] = (),
    ) -> TokenSet:
        tokens = self.known.get(source, asked, make, beside)
        check_vocabulary(tokens, self.shape.vocabulary)
        return tokens


def entry_tokens(entry: PerplexityConfig, tokenizer: Any, shape: ModelShape) -> TokenSet:
    """The windows of an evaluation entry, for a model of this shape. Raises UsageError."""
    source, asked = _windows_of(entry, shape)
    tokens = evaluation_tokens(tokenizer, source, **asked)
    check_vocabulary(tokens, shape.vocabulary)
    return tokens


@dataclass(frozen=True)
class _Identities:
    """Gives the trials of a model their identities.

    recovery, row: `recovery_id` of this model, and `trial_id` of these texts
    calibrations, data: token sets by what asks for them;  criteria: hashes of the user's own, by their text
    """

    recovery: Callable[..., str]
    row: Callable[[str], str]
    calibrations: Mapping[CalibrationConfig, TokenSet]
    data: Mapping[CalibrationConfig, TokenSet]
    criteria: Mapping[str, str]

    def of(self, planned: PlannedTrial, number: int) -> SweepTrial:
        trial, calibration = planned.trial, planned.calibration
        hashed = partial(
            self.recovery,
            calibration_hash=self.calibrations[calibration].content_hash if calibration else None,
            criterion_hash=self.criteria.get(str(trial.criterion)),
        )
        own_data = self.data[trial.data] if trial.data else None
        identity = hashed(trial, data_hash=own_data.content_hash if own_data else None)
        has_twin = not trial.is_dense and trial.statistics_stream != "recovered"
        found = SweepTrial(
            planned,
            identity,
            self.row(identity),
            number,
            dense_id=self.row(self.recovery(Trial.dense(), calibration_hash=None)),
            pruned_id=self.row(hashed(only_pruned(trial))) if has_twin else None,
        )
        if trial.recovery != "retrain" or calibration is None:
            return found
        tokens = own_data or self.calibrations[calibration]
        return replace(
            found,
            start_id=hashed(trial.start or only_pruned(trial)),
            data_hash=tokens.content_hash,
            data_tokens=len(tokens) * tokens.sequence_length,
        )


class _Lazy:
    """A value that is made when it is first asked for."""

    def __init__(self, make: Any) -> None:
        self._make, self._value = make, None

    def __call__(self) -> Any:
        if self._value is None:
            self._value = self._make()
        return self._value


def _windows_of(entry: PerplexityConfig, shape: ModelShape) -> tuple[TextSource, dict[str, Any]]:
    """What `evaluation_tokens` is asked for: text, and all else."""
    asked = {
        "sequence_length": entry.sequence_length,
        "max_windows": entry.max_windows,
        "bos_each_window": entry.bos_each_window,
        "max_positions": shape.max_positions,
    }
    return _source_of(entry), asked


def _source_of(config: CalibrationConfig | PerplexityConfig) -> TextSource:
    return TextSource(config.dataset, config.config, config.data_files, config.split)


def _validation_source(config: ValidationConfig, calibration: CalibrationConfig) -> TextSource:
    if config.dataset is None:
        split = config.split or calibration.split
        return TextSource(calibration.dataset, calibration.config, calibration.data_files, split)
    return TextSource(config.dataset, config.config, config.data_files, config.split or calibration.split)


def _check_distinct(calibrations: dict[CalibrationConfig, TokenSet]) -> None:
    """Two calibration sets of equal tokens would be the same trials twice, and no spread over seeds."""
    seen: dict[str, CalibrationConfig] = {}
    for config, tokens in calibrations.items():
        other = seen.setdefault(tokens.content_hash, config)
        if other != config:
            raise UsageError(
                f"calibration sets with seeds {other.seed} and {config.seed} hold the same tokens",
                where="seed",
                remedy="Rows of `input_ids` are taken in order, whatever the seed: give one seed, or several files.",
            )


def _phases(
    trials: list[SweepTrial], studies: list[Study], calibrations: dict[CalibrationConfig, TokenSet]
) -> tuple[Phase, ...]:
    """One phase per calibration set; the dense trial, which has none, goes with the first."""
    first = next(iter(calibrations))
    listed: dict[CalibrationConfig, list[SweepTrial]] = {config: [] for config in calibrations}
    chosen: dict[CalibrationConfig, list[Study]] = {config: [] for config in calibrations}
    for trial in trials:  # once: comparing each with every set took minutes for hundreds of sets
        listed[trial.planned.calibration or first].append(trial)
    for study in studies:
        chosen[study.calibration].append(study)
    return tuple(
        Phase(config, tokens, tuple(listed[config]), tuple(chosen[config]))
        for config, tokens in calibrations.items()
    )
