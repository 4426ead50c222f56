"""The model card of an exported trial: what it is, how it was made and measured, and how it is used. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from raysweep.analysis.rows import protocol_words
from raysweep.config.dialect import dump_yaml
from raysweep.config.trial import Trial
from raysweep.results.schema import PERPLEXITY_PREFIX

PROVENANCE = (
    "trial_id",
    "recovery_id",
    "sweep",
    "model_hash",
    "calibration_hash",
    "finished_at",
    "raysweep_version",
    "torch_version",
    "transformers_version",
    "ray_version",
    "device_name",
    "threads",
)


@dataclass(frozen=True)
class Exported:
    """What was found out while a trial was exported.

    name: of the folder;  dtype: of its weights;  zeros, prunable: removed weights, and weights of pruned linears
    measured: perplexities of the exported model by column, where its weights are rounded; else they are the row's
    recomputed: in words how a trial that was not kept compares with its row; None for one that was kept
    base: the dense model's Hugging Face id, where it has one
    licence: what the dense model's card says of it, by the card's own keys (`license`, `license_name`, `license_link`)
    """

    name: str
    dtype: str
    zeros: int
    prunable: int
    measured: Mapping[str, float] | None = None
    recomputed: str | None = None
    base: str | None = None
    licence: Mapping[str, Any] = field(default_factory=dict)


def model_card(row: Mapping[str, Any], exported: Exported) -> str:
    """The README.md of an exported folder. row: of the trial, without what is null"""
    parts = [_front_matter(row, exported), _what(row, exported), _numbers(row, exported), _made(row)]
    parts += [_use(exported), _files(row), _provenance(row, exported)]
    return "\n".join(parts)


def public_name(path: str) -> str:
    """A model or data set without the folders of the machine that it lies on."""
    return Path(path).name if path.startswith((".", "/", "~")) or Path(path).exists() else path


def _front_matter(row: Mapping[str, Any], exported: Exported) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    criterion = str(row["criterion"]).partition(":")[0]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type="perplexity",
            metric_value=round(value, 4),
        )
        for name, value in _perplexities(row, exported.measured or row).items()
    ]
    data = ModelCardData(
        base_model=exported.base,
        **exported.licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["raysweep", "pruning", "sparsity", criterion],
        model_name=exported.name,
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _perplexities(row: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, float]:
    """By name of the evaluation entry, first the one that fills `perplexity`."""
    columns = [name for name in row if name.startswith(PERPLEXITY_PREFIX) and name in found]
    return {name.removeprefix(PERPLEXITY_PREFIX): float(found[name]) for name in columns}


def _what(row: Mapping[str, Any], exported: Exported) -> str:
    share = exported.zeros / exported.prunable if exported.prunable else 0.0
    how = {
        "none": "and not recovered",
        "reconstruct": "and recovered by local reconstruction",
        "retrain": "and retrained under the same mask",
    }
    return (
        f"# {exported.name}\n\n"
        f"`{public_name(row['model'])}`, pruned by raysweep {how[row['recovery']]}: {exported.zeros:,} of "
        f"{exported.prunable:,} weights of its pruned linear layers ({share:.1%}) are exactly zero.\n"
    )


def _numbers(row: Mapping[str, Any], exported: Exported) -> str:
    """Perplexities of the dense model, before recovery, of the trial, and of the folder where it is another one."""
    measures = _measures(row)
    known = [("dense", {"perplexity": row.get("dense_perplexity")})]
    if row["recovery"] != "none":
        known.append(("pruned, before recovery", {"perplexity": row.get("pruned_perplexity")}))
    known.append((f"this trial, computed in {row['dtype']}", dict(row)))
    if exported.measured is not None:
        known.append((f"this folder, stored in {exported.dtype}", dict(exported.measured)))
    lines = [f"| model | {' | '.join(measures)} |", f"|---|{'---|' * len(measures)}"]
    lines += [f"| {title} | {_shown(measures.values(), found)} |" for title, found in known]
    protocol = protocol_words(row.get("evaluation_protocol"))
    rounded = (
        f"The weights are stored in {exported.dtype}, which rounds them: the folder was measured again."
        if exported.measured is not None
        else f"The weights are stored in {exported.dtype} and are those of the trial, not rounded."
    )
    return (
        "## Perplexity\n\n"
        + "\n".join(lines)
        + f"\n\nMeasured on {protocol} (windows x tokens): the text is joined, "
        "tokenized once and cut into windows; perplexity is exp of the mean next-token loss over their targets. Trials "
        f"are selected on validation text. {rounded}\n"
    )


def _measures(row: Mapping[str, Any]) -> dict[str, str]:
    """By words the columns that are shown; the first evaluation entry is `perplexity` itself."""
    first, *others = list(_perplexities(row, row)) or ["text"]
    found = {first: "perplexity"} | {name: f"{PERPLEXITY_PREFIX}{name}" for name in others}
    return found | (
        {"validation": "validation_perplexity"} if row.get("validation_perplexity") is not None else {}
    )


def _shown(columns: Iterable[str], found: Mapping[str, Any]) -> str:
    values = [found.get(column) for column in columns]
    return " | ".join("" if value is None else f"{value:.4f}" for value in values)


def _made(row: Mapping[str, Any]) -> str:
    fields = Trial.from_columns(dict(row)).identity()
    for name in ("sparsity", "start_from"):
        if isinstance(fields.get(name), tuple):
            fields[name] = dict(fields[name])
    if "data" in fields:
        named = {key: fields["data"][key] for key in ("dataset", "data_files") if fields["data"].get(key)}
        fields["data"] = dict(fields["data"]) | {key: public_name(str(text)) for key, text in named.items()}
    kind, colon, rest = str(fields["criterion"]).partition(":")
    fields["criterion"] = f"{kind}{colon}{Path(rest).name}"  # of a file without its folders
    text = dump_yaml(json.loads(json.dumps(fields)))  # tuples as lists
    calibration = (
        f"{row['calibration_num_samples']} x {row['calibration_sequence_length']} tokens of "
        f"`{public_name(row['calibration_dataset'])}`, seed {row['calibration_seed']}"
    )
    return (
        "## How it was made\n\nAs a group of a raysweep search space; what it does not name is as by default.\n\n"
        f"```yaml\n{text}```\n\nCalibration set: {calibration}.\n"
    )


def _use(exported: Exported) -> str:
    return f"""\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{exported.name}", dtype="auto")    # the path of this folder
tokenizer = AutoTokenizer.from_pretrained("{exported.name}")
```

To share it (`pip install huggingface_hub`, `hf auth login`):

```bash
hf upload YOUR-NAME/{exported.name} . --repo-type model
```

or `huggingface_hub.upload_folder(repo_id="YOUR-NAME/{exported.name}", folder_path=".")`.
"""


def _files(row: Mapping[str, Any]) -> str:
    also = (
        ", and the weights that are left where the criterion has updated them"
        if row["recovery"] == "none"
        else ""
    )
    return (
        "`model*.safetensors` are ordinary dense weights with exact zeros. `masks.safetensors` holds for every pruned "
        f"linear layer a uint8 tensor of 0 (removed) and 1, in the layout of its weight{also}. In a search space of "
        "raysweep this folder, DIR, can be `model.path`; `criterion: file:DIR/masks.safetensors` keeps its zeros.\n"
    )


def _provenance(row: Mapping[str, Any], exported: Exported) -> str:
    lines = ["## Provenance", "", "| | |", "|---|---|", f"| model | {public_name(row['model'])} |"]
    lines += [f"| {name} | {_said(row[name])} |" for name in PROVENANCE if row.get(name) is not None]
    lines.append(f"| weights | {exported.recomputed or 'kept when the trial was measured'} |")
    return "\n".join([*lines, ""])


def _said(value: Any) -> str:
    return f"{value:%Y-%m-%d %H:%M:%S} UTC" if isinstance(value, datetime) else str(value)
