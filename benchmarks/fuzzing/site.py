"""What generated inputs are made from: a tiny model with its tokenizer, text, masks, a functioning sweep."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

VOCABULARY, POSITIONS, HIDDEN, INNER, BLOCKS = 96, 64, 16, 32, 2
LINEARS = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
SWEEP = "small"  # name of the sweep that has run


@dataclass(frozen=True)
class Site:
    """The folder of all that inputs are made from; nothing in it may change while commands run."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def odd_models(self) -> list[Path]:
        """The model with a weight that is no number, an infinite one, and weights that overflow."""
        return [self.root / name for name in ("model-nan", "model-inf", "model-huge")]

    @property
    def text(self) -> Path:
        """Parquet with a column `text`."""
        return self.root / "text.parquet"

    @property
    def rows(self) -> Path:
        """Parquet with a column `input_ids`."""
        return self.root / "rows.parquet"

    @property
    def masks(self) -> Path:
        return self.root / "masks.safetensors"

    @property
    def storage(self) -> Path:
        """Holds a sweep that has run, called SWEEP."""
        return self.root / "storage"

    @property
    def space(self) -> Path:
        return self.root / "small.yaml"


@dataclass
class Case:
    """One input: a command line, and the environment beside it. The files that it names lie in the case's folder.

    may_write: the only folder below which the command may write; None = nowhere
    """

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    may_write: Path | None = None


def small_space(site: Site) -> dict[str, Any]:
    """The dense model, two pruned trials and two that are reconstructed."""
    return {
        "name": SWEEP,
        "model": {"path": str(site.model)},
        "calibration": {"dataset": str(site.text), "num_samples": 4, "sequence_length": 16},
        "validation": {"samples": 2},
        "evaluation": {
            "perplexity": [
                {"name": "tiny", "dataset": str(site.text), "split": "train", "sequence_length": 16}
                | {"max_windows": 3}
            ]
        },
        "sweep": [
            {"recovery": "none", "criterion": ["magnitude", "wanda"], "sparsity": 0.5},
            {"recovery": "reconstruct", "criterion": "wanda", "sparsity": 0.5, "learning_rate": 0.01}
            | {"granularity": ["subblock", "block"]},
        ],
    }


def build_site(root: Path) -> Site:
    """Makes everything but the sweep, which a command must run (the caller's, into `site.storage`)."""
    site = Site(root)
    root.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    words = ["".join(chance.choices("aeiou klmnrst", k=chance.randint(2, 6))) for _ in range(80)]
    documents = [" ".join(chance.choices(words, k=chance.randint(20, 120))) for _ in range(120)]
    pq.write_table(pa.table({"text": documents}), site.text)
    rows = [[chance.randrange(VOCABULARY) for _ in range(24)] for _ in range(24)]
    pq.write_table(pa.table({"input_ids": rows}), site.rows)
    _save_model(site, documents)
    _save_odd_models(site)
    _save_masks(site)
    site.space.write_text(json.dumps(small_space(site), indent=1), encoding="utf-8")
    return site


def _save_model(site: Site, documents: list[str]) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, show_progress=False)
    core.train_from_iterator(documents, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", unk_token="<unk>", model_max_length=POSITIONS
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).float().save_pretrained(site.model)
    tokenizer.save_pretrained(site.model)


def _save_odd_models(site: Site) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    for folder, value in zip(site.odd_models, (float("nan"), float("inf"), 1e30), strict=True):
        shutil.copytree(site.model, folder)
        tensors = load_file(folder / "model.safetensors")
        weight = tensors["model.layers.1.mlp.up_proj.weight"]
        if value == 1e30:
            weight *= value
        else:
            weight[3, 5] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _save_masks(site: Site) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(site.model / "model.safetensors")
    names = [f"model.layers.{block}.{linear}" for block in range(BLOCKS) for linear in LINEARS]
    masks = {name: torch.rand(weights[f"{name}.weight"].shape).gt(0.5).to(torch.uint8) for name in names}
    save_file(masks, site.masks)
