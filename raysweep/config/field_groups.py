"""Which fields of a trial belong together: those of its mask, of its recovery, of steps."""

from __future__ import annotations

MASK_FIELDS = (
    "criterion",
    "sparsity",
    "pattern",
    "comparison_group",
    "statistics_stream",
    "dampening",
    "column_block",
    "ria_power",
    "targets",
    "ignore",
)
STEP_FIELDS = (
    "learning_rate",
    "epochs",
    "batch_size",
    "shuffle",
    "warmup_fraction",
    "max_grad_norm",
)
RECOVERY_FIELDS = (
    "granularity",
    "input_stream",
    "target_stream",
    "loss",
    "trainable",
    "lora_rank",
    "lora_alpha",
    "optimizer",
    *STEP_FIELDS,
)
LORA = ("lora", "lora+norms")
RETRAIN_FIELDS = (
    "start_from",
    "data",
    "loss",
    "trainable",
    "lora_rank",
    "lora_alpha",
    "optimizer",
    *STEP_FIELDS,
    "zero_stage",
    "offload",
    "gradient_accumulation",
    "gradient_checkpointing",
)
RETRAIN_DEFAULTS = {"loss": "next_token", "max_grad_norm": 1.0}  # where they are not those of reconstruction
NAME_FIELDS = ("targets", "ignore")  # whose value is a list of names
MAPPING_FIELDS = ("start_from", "data")  # whose value is a mapping
JSON_FIELDS = (*NAME_FIELDS, *MAPPING_FIELDS)  # text in tables
UNIT_LOSSES, MODEL_LOSSES = ("mse", "normalized_mse", "cosine"), ("next_token", "distillation")
