"""A seeded choice of token sequences: what statistics and recovery see."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from raysweep.config.fields import FROZEN, Count, Seed, Text, setting
from raysweep.config.limits import MAX_COUNT

CALIBRATION_COLUMNS = tuple(
    f"calibration_{name}" for name in ("dataset", "num_samples", "sequence_length", "sampling", "seed")
)
WHOLE_VALUES = "a whole number from 1"
SEED_VALUES = "a whole number from 0"
DATASET_VALUES = (
    "builtin:NAME, a Hugging Face data set id, or a file: .parquet or .jsonl with a `text` column, .txt, or "
    ".parquet with an `input_ids` column, whose rows are the samples themselves"
)


class CalibrationConfig(BaseModel):
    """The text that statistics and reconstruction see."""

    model_config = FROZEN

    dataset: Text = setting("where the text comes from", values=DATASET_VALUES)
    config: Text | None = setting(
        "configuration of a Hugging Face data set", default=None, values="text, or null"
    )
    data_files: Text | None = setting(
        "files of a Hugging Face data set (a pattern such as `en/*.json.gz`)",
        default=None,
        values="text, or null",
    )
    split: Text = setting("split of the data set", default="train", values="text")
    sampling: Literal["pack", "document"] = setting(
        "pack = documents joined and cut into windows; document = a random window of a long enough document",
        default="pack",
    )
    num_samples: Count = setting("number of sequences", default=64, values=WHOLE_VALUES)
    sequence_length: Annotated[int, Field(ge=2, le=MAX_COUNT)] = setting(
        "tokens in one sequence", default=256, values="a whole number from 2"
    )
    seed: Seed = setting("which sequences are drawn", default=0, values=SEED_VALUES)
