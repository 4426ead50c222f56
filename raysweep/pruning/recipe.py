"""All that a mask depends on besides the model and the activations."""

from __future__ import annotations

from dataclasses import dataclass

from raysweep.config.names import matches
from raysweep.config.trial import Trial
from raysweep.pruning.rules import ComparisonGroup, MaskRule


@dataclass(frozen=True)
class MaskRecipe:
    """Equal recipes give equal masks, so trials share them.

    sparsity: one for all linears, or pairs of a name pattern and its own;  stream: of the statistics, None where none
    are read;  seed: None where nothing is random. The others as in `Trial`, null where they do not apply.
    """

    criterion: str
    sparsity: float | tuple[tuple[str, float], ...] | None
    n_of_m: tuple[int, int] | None
    comparison_group: ComparisonGroup | None
    stream: str | None
    dampening: float | None
    column_block: int | None
    ria_power: float | None
    targets: tuple[str, ...] | None
    ignore: tuple[str, ...] | None
    seed: int | None

    @classmethod
    def of(cls, trial: Trial) -> MaskRecipe:
        """The recipe of a trial that prunes."""
        return cls(
            criterion=str(trial.criterion),
            sparsity=trial.sparsity,
            n_of_m=trial.group_size,
            comparison_group=trial.comparison_group,
            stream=trial.statistics_stream,
            dampening=trial.dampening,
            column_block=trial.column_block,
            ria_power=trial.ria_power,
            targets=trial.targets,
            ignore=trial.ignore,
            seed=trial.seed if trial.criterion == "random" else None,
        )

    def prunes(self, name: str) -> bool:
        """Whether the linear of that full name is one of those that are pruned."""
        targeted = self.targets is None or any(matches(pattern, name) for pattern in self.targets)
        ignored = self.ignore is not None and any(matches(pattern, name) for pattern in self.ignore)
        left_dense = isinstance(self.sparsity, tuple) and self.rule(name).sparsity == 0.0
        return targeted and not ignored and not left_dense

    def rule(self, name: str) -> MaskRule:
        """How much goes of the linear of that name. Of a mapping the first pattern that matches counts, else 0."""
        if self.n_of_m is not None:
            return MaskRule(n_of_m=self.n_of_m)
        sparsity = self.sparsity
        if isinstance(sparsity, tuple):
            sparsity = next((value for pattern, value in sparsity if matches(pattern, name)), 0.0)
        return MaskRule(sparsity or 0.0, comparison_group=self.comparison_group or "row")
