"""`raysweep export` from beginning to end: a trial's weights, kept or computed again, as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from raysweep.analysis.card import Exported, model_card
from raysweep.config.criterion import is_mask_file
from raysweep.config.sections import ModelConfig
from raysweep.config.space import SearchSpace
from raysweep.errors import RaysweepError, StorageError, UsageError, first_line
from raysweep.launching.recomputing import Alone, compared, measured, prepared_alone, recompute
from raysweep.model.builtin import is_builtin
from raysweep.model.checkpoint import Checkpoint, ModelSource
from raysweep.model.export import BlockTensors, Written, write_folder
from raysweep.model.shape import model_hash
from raysweep.results.artifacts import Kept, artifact_folder
from raysweep.results.finding import find_trial
from raysweep.results.folders import SPACE_FILE

CARD, MARKER = "README.md", "raysweep.json"
LICENCE_KEYS = ("license", "license_name", "license_link")  # of a model card on Hugging Face
CHECKPOINT = "checkpoint"  # the dtype that each tensor of the dense model's has

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Export:
    """What an export wrote, as it says itself in the folder.

    dtype: of the weights;  perplexity: of the trial's row
    measured: perplexities of the folder by column, where writing has rounded weights; else they are the row's
    recomputed: in words how a trial that was not kept compares with its row; None for one that was kept
    files: names of all that was written
    """

    trial_id: str
    recovery_id: str
    sweep: str
    dtype: str
    perplexity: float
    recomputed: str | None
    measured: dict[str, float] | None
    files: list[str] = field(default_factory=list)


def export(
    trial: str,
    output: Path,
    *,
    storage: str | Path | None = None,
    dtype: str = CHECKPOINT,
    tell: Tell = lambda text: None,
) -> Export:
    """Writes the model of a trial as a Hugging Face folder: all of it, or nothing.

    trial, storage: as of `find_trial`;  dtype: checkpoint (each tensor as the dense model has it), or that of all
    weights;  tell: hears of what takes seconds
    A trial that was not kept is computed again. Raises UsageError for what cannot be exported, RaysweepError where what
    was computed again is not what the row says.
    """
    folder, row = find_trial(trial, storage)
    output = output.resolve()
    _check_row(row)
    _check_output(output, row["trial_id"])
    space = SearchSpace.from_yaml(folder / SPACE_FILE)
    with _aside(output) as aside:
        return _Exporting(folder, row, space, aside, dtype, tell).write(output)


def _check_row(row: Mapping[str, Any]) -> None:
    """Refuses trials that have no weights of their own."""
    if row["status"] != "finished":
        how = f"failed: {row.get('error')}" if row["status"] == "failed" else "was stopped by the scheduler"
        raise UsageError(f"trial {row['trial_id']} {how}", allowed="a trial that has finished")
    if row["recovery"] == "dense":
        raise UsageError(
            f"trial {row['trial_id']} is the dense model, {row['model']}",
            allowed="a trial that is pruned",
            remedy="Copy the model itself.",
        )


def _check_output(output: Path, trial_id: str) -> None:
    """Refuses a folder that holds anything but an earlier export of the same trial. Makes nothing."""
    existing = next(parent for parent in (output, *output.absolute().parents) if os.path.lexists(parent))
    if problem := _unwritable(existing) or (os.path.ismount(output) and "it is a mount point"):
        raise UsageError(
            f"{output} cannot be written: {problem}",
            where="--output",
            allowed="a folder that can be made and written; the finished model takes its place",
        )
    if existing != output or not any(output.iterdir()):
        return
    earlier = _earlier(output)
    if earlier is None or earlier.trial_id != trial_id:
        what = "is not empty" if earlier is None else f"is an export of another trial, {earlier.trial_id}"
        raise UsageError(
            f"{output} {what}",
            where="--output",
            allowed="a new folder, or an earlier export of the same trial",
        )
    names = {path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir()}
    if others := sorted(names - set(earlier.files)):
        raise UsageError(
            f"{output} also holds {others[0]}, which export did not write and would remove",
            where="--output",
            remedy="Move it, or name another folder.",
        )


def _unwritable(folder: Path) -> str | None:
    if not folder.is_dir():
        return f"{folder} is no folder"
    return None if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else f"{folder} is read-only"


def _earlier(output: Path) -> Export | None:
    try:
        earlier = Export(**json.loads((output / MARKER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    named = isinstance(earlier.files, list) and all(isinstance(name, str) for name in earlier.files)
    return earlier if named else None


@contextmanager
def _aside(output: Path) -> Iterator[Path]:
    """A folder beside the output, which is gone afterwards. Raises UsageError where none can be made."""
    aside = output.absolute().parent / f".{output.absolute().name[-60:]}.{secrets.token_hex(4)}.tmp"
    made = [parent for parent in aside.parents if not parent.exists()]
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"{output} cannot be written: {error.strerror or error}",
            where="--output",
            allowed="a folder that can be made and written",
        ) from error
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):
            for each in made:
                each.rmdir()


@contextmanager
def _written_to(output: Path) -> Iterator[None]:
    """Within the context, what cannot be written is a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{output} cannot be written: {error.strerror or error}") from error


class _Exporting:
    """One export; everything is written aside first."""

    def __init__(
        self,
        sweep: Path,
        row: dict[str, Any],
        space: SearchSpace,
        aside: Path,
        dtype: str,
        tell: Tell,
    ) -> None:
        self._sweep, self._row, self._space, self._aside, self._tell = sweep, row, space, aside, tell
        self._dtype = None if dtype == CHECKPOINT else dtype
        self._known: Alone | None = None

    def write(self, output: Path) -> Export:
        source = self._source
        weights, recomputed = self._weights()
        with _written_to(output):
            place = self._aside / "model"
            place.mkdir()
        self._tell("Writing the model")
        updated = self._row["recovery"] == "none" and _may_update(self._row["criterion"])
        written = write_folder(source, weights, place, self._dtype, updated)
        found = measured(self._alone(), place, self._tell) if written.rounded else None
        done = Export(
            trial_id=self._row["trial_id"],
            recovery_id=self._row["recovery_id"],
            sweep=self._sweep.name,
            dtype=written.dtype,
            perplexity=self._row["perplexity"],
            recomputed=recomputed,
            measured=found,
        )
        done = replace(done, files=[*written.files, CARD, MARKER])
        card = model_card(self._row, self._about(output.absolute().name, source, written, done))
        with _written_to(output):
            (place / CARD).write_text(card, encoding="utf-8")
            (place / MARKER).write_text(json.dumps(asdict(done), indent=1) + "\n", encoding="utf-8")
        _put(place, output, self._aside / "earlier")
        return done

    @cached_property
    def _source(self) -> ModelSource:
        """The dense model. Raises UsageError where it is not the one that was pruned."""
        path = self._row["model"]
        configs = [one for one in self._space.models if one.path == path] or [ModelConfig(path=path)]
        sources = {ModelSource(path, config.revision, config.trust_remote_code): None for config in configs}
        self._tell("Checking the model")
        unread: UsageError | None = None
        for source in sources:  # several where the space has several revisions
            try:
                if model_hash(source) == self._row.get("model_hash"):
                    return source
            except UsageError as error:
                unread = error
        if unread is not None:
            raise unread
        raise UsageError(
            f"model {path!r} is not the one that was pruned: its weights or its configuration have changed since",
            remedy="Bring back the model, or launch the sweep again, which makes new trials.",
        )

    def _weights(self) -> tuple[BlockTensors, str | None]:
        """The trial's weights, and in words how they compare with the row where they are computed again."""
        folder = artifact_folder(self._sweep, self._row["trial_id"])
        kept = Kept.read(folder)
        if kept is not None and kept.recovery_id == self._row["recovery_id"]:
            try:
                if missing := kept.missing(folder):
                    raise RaysweepError(f"{missing[0]} is not there")
                weights = BlockTensors(folder)
                weights.check()
                return weights, None
            except RaysweepError as error:
                self._tell(f"The kept weights are damaged: {first_line(error)}")
        self._tell("This trial was not kept, so it is computed again")
        again, folder = recompute(self._alone(), self._aside / "sweep", self._tell)
        return BlockTensors(folder), compared(self._row, again)

    def _alone(self) -> Alone:
        if self._known is None:
            self._known = prepared_alone(self._row, self._space, self._source, self._tell)
        return self._known

    def _about(self, name: str, source: ModelSource, written: Written, done: Export) -> Exported:
        base = None if source.is_local or is_builtin(source.path) else source.path
        return Exported(
            name=name,
            dtype=written.dtype,
            zeros=written.zeros,
            prunable=written.prunable,
            measured=done.measured,
            recomputed=done.recomputed,
            base=base,
            licence=_licence(source, written.files),
        )


def _may_update(criterion: str) -> bool:
    """Whether pruning by it may change the weights that stay."""
    return criterion == "sparsegpt" or is_mask_file(criterion)


def _licence(source: ModelSource, files: Collection[str]) -> dict[str, Any]:
    """As the dense model's own card says it, by the keys that it has of them.

    files: of the exported folder, to one of which the card may point
    """
    from huggingface_hub import ModelCard

    path = Checkpoint(source).find(CARD)
    if path is None:
        return {}
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # whatever is wrong with somebody's card, it only costs these lines
        return {}
    if not found.get("license"):
        return {}
    link = str(found.get("license_link", ""))
    stays = link in files or "://" in link
    return {key: found[key] for key in LICENCE_KEYS if key in found and (stays or key != "license_link")}


def _put(place: Path, output: Path, earlier: Path) -> None:
    """Moves a complete folder to where it belongs; what lay there is moved aside before."""
    with _written_to(output):
        try:
            if output.exists() and any(output.iterdir()):
                os.rename(output, earlier)
            os.rename(place, output)
        except OSError:
            if earlier.exists() and not output.exists():
                os.rename(earlier, output)
            raise
