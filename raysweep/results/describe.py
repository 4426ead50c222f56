"""Writes the reference of the result columns from their descriptions in the code: docs/results.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from raysweep.config.describe import markdown_table
from raysweep.results.schema import NOT_NUMBERS, TRIAL_COLUMNS, UNIT_COLUMNS, Column

_INTRODUCTION = """\
# Results

A sweep lies in `STORAGE/NAME/`. STORAGE is `--storage`, else `RAYSWEEP_STORAGE`, else `execution.storage`,
else `./raysweep-results`: a folder, or a URI (below).

| file | holds |
| --- | --- |
| `space.yaml` | the search space with all defaults filled in |
| `trials/*.parquet` | one file, one row for each trial; many in that of `raysweep clean`, `0-compacted.parquet` |
| `units/*.parquet` | one file for each trial, with a row for each of its units, linears and blocks; likewise |
| `artifacts/` | the weights of kept trials (below) |
| `status.json` | what the launching process last said about its progress |
| `plan.json` | seconds of the last launch that had work to do and the most memory of a shard, beside what was planned |
| `trace.json` | of `launch --trace`: what launch and shards did when |
| `unfinished/` | recovered units of trials that have no row yet |
| `tensorboard/`, `mlflow/`, `wandb/` | what experiment trackers were told, where the space names any (below) |

`trials` and `units` are ordinary Parquet data sets. The easiest way to read them, without torch or Ray:

```python
import raysweep

trials = raysweep.load_results("quickstart")      # a name in the storage, or the path of a sweep
units = raysweep.load_units("quickstart")
trials.query("status == 'finished'").sort_values("validation_perplexity")
```

A row appears when its trial is over, whole or not at all, and is replaced when the trial runs again. A
column is null where it does not apply. `raysweep clean` puts the rows of finished trials, which are never
written again, into one file: 5,000 trials are then read in 0.03 s instead of 2 s, and take 1 % of the space.
Whatever ends it, no row is lost; while it runs, or after it was killed, pandas alone may see a trial twice,
`load_results` does not. Sweeps whose evaluation was extended have more `perplexity_<name>` and `task_<name>`
columns in later files; `load_results` unites them.

**Storage that a URI names.** `--storage s3://BUCKET/PREFIX`, or any other URI that `pyarrow.fs` knows (`gs://`, `abfs://`,
`hdfs://`, `file://`). Rows, space, state and trace lie there in the same folders; `load_results("s3://BUCKET/PREFIX/NAME")`
and all commands take it. This machine has a mirror of it in `RAYSWEEP_CACHE` (`~/.cache/raysweep`): it is brought up to
date before anything is read, rows are written there first and copied within a second or two, units before trials. What
does not get through is tried again for about a minute, then ends the sweep; nothing of it is lost, the next launch on
this machine copies it. Credentials are those of the cloud's own tools (`AWS_ACCESS_KEY_ID` and
`AWS_SECRET_ACCESS_KEY`, `~/.aws`, a role); servers other than Amazon's are named by `AWS_ENDPOINT_URL`, or by
`?endpoint_override=HOST:PORT&scheme=http` behind the URI. A sweep is launched once at a time there too, by a file with
a heartbeat: best effort, since such storages cannot lock; a machine that is gone gives it up after a minute. What is
removed in the storage is removed from mirrors. Recovered units, checkpoints and Tune's state stay in the mirror, so a
launch on another machine begins interrupted trials anew, and on several nodes retraining, and tasks on all trials, need
a `RAYSWEEP_CACHE` that they share.

**Kept trials** lie in the mirror alone, too: on another machine `raysweep export` computes them again. On several nodes
nothing is kept unless they share the folder, or `RAYSWEEP_CACHE`.

**Experiment trackers.** `execution: {trackers: [tensorboard, mlflow, wandb]}` in the space, or one of them by
`--set 'execution.trackers=[mlflow]'`, tells them of every trial that runs, by Ray Tune's own callbacks: a run with
the trial's label as its name, its fields as parameters, and the numbers of quality and cost as metrics. Experiment
(MLflow), project and group (Weights and Biases) are called like the sweep. A package or login that is missing is
refused before anything starts.

| tracker | needs | its runs are in |
| --- | --- | --- |
| `tensorboard` | nothing more | `tensorboard/` |
| `mlflow` | `pip install mlflow-skinny` | MLFLOW_TRACKING_URI, or `mlflow/mlflow.db` |
| `wandb` | `pip install wandb`, `wandb login` | your account and `wandb/`; with WANDB_MODE=offline there alone |

`tensorboard --logdir STORAGE/NAME/tensorboard`, `mlflow ui --backend-store-uri sqlite:///STORAGE/NAME/mlflow/mlflow.db`
and `wandb sync` show what lies there; the first two are in the packages `tensorboard` and `mlflow`. What else you set
for them in the environment of the launch counts: MLFLOW_EXPERIMENT_NAME, WANDB_PROJECT, WANDB_RUN_GROUP, WANDB_DIR.

Rows stay the record. A tracker that fails says so once, and the sweep goes on without it; after the last trial it is
given up when it does not answer for a minute and a half, or has not taken all in a quarter of an hour; after Ctrl-C
in five seconds. Trials that have their rows already are not told again; one that runs again is another run, in
TensorBoard a continuation of the same. Values at the rungs of a scheduler are called `rung_...`, because they are of
a model that is partly dense. Retrained trials are there once they are measured. A run of Weights and Biases takes two
processes of the launching machine, one of them 200 MB. `raysweep clean` leaves the three folders; of a storage that a
URI names they are in its mirror alone. `--in-process` has no Tune, and refuses trackers.

**Identities.** `recovery_id` is made of all that determines a trial's weights: its fields, the contents of
model and calibration set, the number format, and the version of our arithmetic. `trial_id` adds how it was
measured. Paths, machines, threads and library versions are columns, not identity. A trial whose `trial_id`
has a finished row is never run again.

**The numbers of a trial** are all columns but those marked *varies*: cost, provenance and the shard. They
do not depend on the number of shards or of concurrent trials.

## Kept trials and export

`execution.keep` says whose weights stay on storage when a trial has its row: those of the best one of every cell
(equal columns of `search.compare_within`, by `search.metric`; of the same weights, number format and validation
text), of all, or of none. The shards write them once the trial is measured, block by block with the masks, if no
trial of the cell with a row is better; what a better one replaces is removed. Weights that cannot be written (a full
disk) cost no row: the trial is not kept, which is said. A launch with `keep: best` after one with `keep: all` leaves
the best ones, once it has trials to run. `raysweep plan` says how much they take, `raysweep clean
--artifacts` removes them.

`raysweep export TRIAL --output DIR` writes a trial's model as a folder that `transformers` loads. TRIAL is a `trial_id`
or its first digits; `SWEEP:TRIAL` where several sweeps have it.

| file | holds |
| --- | --- |
| `config.json`, `model*.safetensors` | as the checkpoint's, with the trial's weights; removed ones are exactly zero |
| `masks.safetensors` | for every pruned linear 0 (removed) and 1 as uint8, in the layout of its weight (more below) |
| tokenizer, `generation_config.json`, licence | those of the dense model, where it has them |
| `README.md` | a model card: numbers, protocol, fields of the trial, provenance, how to load and to upload it |
| `raysweep.json` | for programs: whose model it is, its perplexity, and what was written |

Weights have the number format of the checkpoint, tensor by tensor. A trial in float32 of a checkpoint in bfloat16 is
rounded by that: then the folder is measured again, and the card has both numbers. `--dtype float32` writes the weights
as they were, and loads with the perplexity of the row.

A trial that was not kept is computed again from its row and `space.yaml`, in this process on this machine, retrained
ones too (relative paths of model and data in it are looked for from the folder that the command runs in), and its
perplexity compared with the row: to the bit in float32 on a CPU with the same versions, processor and threads, else
(and where it was retrained) within 0.5 %. Beyond that nothing is written, and the exit status is 1.
Command and card say so. What has changed since (model, text, criterion) is refused. DIR is new (and no mount point), or
holds an earlier export of the same trial and nothing else; it is complete, or not there.

An exported folder can be the `model.path` of another sweep, where `criterion: file:DIR/masks.safetensors` keeps its
zeros: to retrain it by next tokens, or to prune it further. Reconstruction has nothing to do there, since its target is
the exported model itself. With the dense model the same file gives the pruned model that recovery began with: it also
has the weights that the criterion itself updates (SparseGPT), as `<linear>.weight`, but only of a trial without
recovery. Of others these would undo the recovery in the exported folder.

## The report

`raysweep report NAME` writes what a sweep found into a folder, `./NAME-report` or `--output`, also while it runs:

| file | holds |
| --- | --- |
| `index.html` | the page, which needs no other file and no network |
| `figures/*.svg`, `figures/*.png` | its figures, one for each model and sparsity |
| `recipe.yaml` | a search space that runs what the page recommends; several for several models or sparsities |

The page begins with what is missing (planned trials without a row, one seed, learning rates at an end of their
ladder), then come verdicts, the recommended setting, quality against cost, criteria, learning rates, errors by depth,
all trials, and where the numbers come from. Written again it replaces its own files; the page of somebody else is not
overwritten.

A verdict compares values of equal seeds, each setting at the learning rate that validation has chosen. *Better* and
*worse* are a difference that a paired t test finds, *equivalent* is one that two one-sided tests find smaller than the
margin: the larger of `--margin` (0.1 perplexity) and `--margin-percent` (1 % of what is compared with). Everything
else is *undecided*, as all is with one seed. Both kinds of p values are corrected by Holm's method over all
comparisons of the page.

`raysweep results` chooses from the same rows. `--where "sparsity == 0.6 and criterion in ['wanda', 'ria']"` shows the
trials for which that is true: columns (in backticks where they are no plain names), numbers, quoted texts and `null`,
with `== != < <= > >= in`, `and or not`, `+ - * /` and parentheses. What is null compares as false with all but
`null`, by `!=` too, so that `not granularity == 'matrix'` has more trials than `granularity != 'matrix'`.
`--pareto` shows, beside the dense models, the trials of settings than which no other one of their model, sparsity and
pattern has less perplexity and takes no more standalone seconds; `--csv` and `--json` print all columns.
"""

_GROUPS = {
    "identity": "Identity and outcome",
    "trial": "Fields of the trial",
    "calibration": "Calibration set",
    "quality": "Quality",
    "structure": "Structure",
    "cost": "Cost",
    "provenance": "Provenance",
}
_TYPES = {
    pa.string(): "text",
    pa.float64(): "number",
    pa.int64(): "whole number",
    pa.bool_(): "true or false",
}


_OPEN_COLUMNS = """
Every entry of `evaluation.perplexity` also has a column `perplexity_<name>`, every one of `evaluation.tasks` a column
`task_<name>`: the first metric that the task lists (for most an accuracy, from 0 to 1), null until the task was
measured on the trial, and on trials that are not kept.
"""


def results_reference() -> str:
    """The text of docs/results.md."""
    trials = [_group(title, group) for group, title in _GROUPS.items() if _columns(group)]
    units = "A row is a reconstruction unit, a pruned linear or a decoder block, as `kind` says.\n"
    return "\n".join([_INTRODUCTION, "## `trials`\n", *trials, "## `units`\n", units, _table(UNIT_COLUMNS)])


def _columns(group: str) -> list[Column]:
    return [column for column in TRIAL_COLUMNS if column.group == group]


def _group(title: str, group: str) -> str:
    text = f"### {title}\n\n{_table(_columns(group))}"
    if group == "trial":
        text += "\nFields that cannot matter to a trial are null, such as `learning_rate` of a pruned one.\n"
    if group == "quality":
        text += _OPEN_COLUMNS
    return text


def _table(columns: Sequence[Column]) -> str:
    rows = [(f"`{column.name}`", _type_words(column), column.description) for column in columns]
    return markdown_table(("column", "type", "meaning"), rows)


def _type_words(column: Column) -> str:
    words = _TYPES.get(column.type, "moment")
    return f"{words}, *varies*" if column.name in NOT_NUMBERS else words


def main(arguments: Sequence[str] | None = None) -> None:
    """python -m raysweep.results.describe docs/results.md"""
    (target,) = sys.argv[1:] if arguments is None else arguments
    Path(target).write_text(results_reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
