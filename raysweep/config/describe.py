"""Writes the reference of the search space from the descriptions in the code: docs/search-space.md."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raysweep.config.calibration import CalibrationConfig
from raysweep.config.field_groups import MASK_FIELDS, RECOVERY_FIELDS, RETRAIN_FIELDS
from raysweep.config.fields import allowed_values, default_of, extra_of
from raysweep.config.sections import (
    EvaluationConfig,
    ExecutionConfig,
    ModelConfig,
    PerplexityConfig,
    SearchConfig,
    ValidationConfig,
)
from raysweep.config.trial import Trial

_INTRODUCTION = """\
# Search space

A search space is a YAML file that says which model is pruned, on which text, and which trials are run.
`raysweep launch FILE.yaml` runs it, `raysweep plan FILE.yaml` shows what would run. This is a complete one:

```yaml
name: first
model: {path: meta-llama/Llama-3.2-1B}
calibration: {dataset: my-text.parquet, sequence_length: 512}
evaluation:
  perplexity:
    - {name: wikitext, dataset: Salesforce/wikitext, config: wikitext-2-raw-v1, sequence_length: 512}
sweep:
  - {recovery: none, criterion: [magnitude, wanda], sparsity: [0.5, 0.6]}
  - recovery: reconstruct
    criterion: wanda
    sparsity: [0.5, 0.6]
    granularity: subblock
    learning_rate: [1e-4, 1e-3]
```

**Axes.** A single value is fixed, a list is an axis. `sweep` is a list of groups. The sweep is the union of
their grids, each distinct trial once; here 4 + 4 trials, and one of the dense model, which every sweep has.
Scalars under `model` and `calibration` may be lists too: `seed: [0, 1, 2]` under `calibration` repeats
everything on three draws of text. Several models or calibration sets run one after another.

**Fields that cannot matter** are not part of a trial. The learning rate of a trial that is only pruned is
null, so a group with `recovery: [none, reconstruct]` and three learning rates has one pruned trial, not
three.

**Sampled fields.** With `search: {algorithm: random, num_samples: 8}` a field of a trial may be drawn:
`{loguniform: [low, high]}` and `{uniform: [low, high]}` for numbers, `{choice: [...]}` for any field. Each
point of the listed axes gets `num_samples` draws, the same ones at every point. Drawn numbers are rounded
to six digits. More samples keep the earlier ones.

**Settings from the command line.** `--set KEY=VALUE` changes one value, with dotted keys and numbers for
places in a list: `--set calibration.seed=1 --set 'sweep.1.learning_rate=[1e-3, 1e-2]'`.

**Mistakes.** An unknown key, a wrong type or an impossible combination is refused before anything starts,
with file, line and key, the value, what is allowed, and the nearest known name. Numbers may be written
`0.001`, `1e-3` or `1.0e-3`; text that looks like a number needs quotes, N:M patterns do not.

**Limits.** The file is plain YAML in UTF-8: tags are not read (nothing in it can run), a key stands once,
anchors and aliases may be used. It has at most 1 MiB, 20 levels and 100,000 values, aliases followed. One
sweep holds at most 100,000 combinations. Weights are read from safetensors only; code runs where it was
asked for by name only: `criterion: module:function`, and `trust_remote_code: true`.
"""

_NAME = """\
## `name`

Names the sweep and its folder in the storage: letters, digits, `.`, `_` and `-`, beginning with a letter or
a digit. Launching under the same name continues the sweep: finished trials are kept, new ones are added.
`--name` replaces it.
"""

_PERPLEXITY = """\
Perplexity: the text is joined, tokenized once and cut into windows of `sequence_length` tokens (a rest is
left out). It is exp of the mean next-token loss over the `sequence_length - 1` targets of each window. The
first entry fills the column `perplexity`, each one its own `perplexity_<name>`.
"""

_TRIAL = """\
## Groups of `sweep`

Every group needs `recovery` and `criterion`, and `sparsity` unless its pattern is N:M or its masks come from a
file. Only linears of the decoder blocks are pruned: all of them unless `targets` or `ignore` say otherwise;
embeddings, head and norms never. A name means every linear that is called so or whose last parts are:
`model.layers.0.mlp.up_proj`, `mlp.up_proj`, `up_proj`; `re:` begins a regular expression, matched from the start
of the name. `targets` and `ignore` take a list of names, so there an axis is a list of lists.

A file of masks is a safetensors file with a uint8 tensor of 0 (removed) and 1 per linear, under the linear's name and
in the layout of its weight, and perhaps updated weights as `<linear>.weight`. A function of your own,
`module:function`, gets a weight (outputs, inputs) and the statistics of its inputs (`norm_I`, `gram_II`, `sum_I`,
`rows`) and returns scores of the weight's shape; its module may lie in the current folder, and its source is part of
the trials' identities.
"""

_RECOVERY = """\
### With `recovery: reconstruct`

Each unit is trained to give the dense model's output again; its zeros stay exactly zero. With `input_stream: dense`
units do not depend on one another, and all shards work on a trial at once. With `pruned` (or masks with
`statistics_stream: recovered`) each waits for those before it, and trials follow one another through the shards.
"""

_RETRAINING = """\
### With `recovery: retrain`

The whole model is trained on text under the same mask, by DeepSpeed on the workers of Ray Train: what reconstruction
is compared with. Trials without retraining run first; then the shards give back their devices, one retraining after
another takes all of them, and the shards come back to measure what came of it. `learning_rate` (required), `epochs`,
`batch_size`, `shuffle`, `warmup_fraction`, `max_grad_norm` (here 1.0), `loss` (here next_token or distillation),
`trainable`, `lora_rank` and `lora_alpha` are those of the table above; the optimizer is AdamW. Besides:
"""


def search_space_reference() -> str:
    """The text of docs/search-space.md."""
    recovery = ("recovery", *MASK_FIELDS, "seed")
    parts = [
        _INTRODUCTION,
        _NAME,
        _section("`model`", ModelConfig),
        _section("`calibration`", CalibrationConfig),
        _section("`validation`", ValidationConfig),
        _section("`evaluation`", EvaluationConfig),
        "Each entry of `evaluation.perplexity`:\n",
        fields_table(PerplexityConfig),
        _PERPLEXITY,
        _TRIAL,
        fields_table(Trial, recovery),
        _RECOVERY,
        fields_table(Trial, RECOVERY_FIELDS),
        _RETRAINING,
        fields_table(Trial, [name for name in RETRAIN_FIELDS if name not in RECOVERY_FIELDS]),
        _section("`search`", SearchConfig),
        _section("`execution`", ExecutionConfig),
    ]
    return "\n".join(parts)


def _section(title: str, cls: type[BaseModel]) -> str:
    return f"## {title}\n\n{cls.__doc__}\n\n{fields_table(cls)}"


def fields_table(cls: type[BaseModel], names: Iterable[str] | None = None) -> str:
    """A Markdown table of fields: what they take, their default and their meaning."""
    chosen = cls.model_fields if names is None else names
    return markdown_table(
        ("field", "values", "default", "meaning"), [_field_row(cls, name) for name in chosen]
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars within cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _field_row(cls: type[BaseModel], name: str) -> list[str]:
    info = cls.model_fields[name]
    words = extra_of(info).get("shown_default")
    default = "required" if info.is_required() else _code(default_of(info))
    values = allowed_values(info).replace(" | ", ", ")
    return [f"`{name}`", values, str(words or default), str(info.description)]


def _code(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main(arguments: Sequence[str] | None = None) -> None:
    """python -m raysweep.config.describe docs/search-space.md"""
    (target,) = sys.argv[1:] if arguments is None else arguments
    Path(target).write_text(search_space_reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
