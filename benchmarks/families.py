"""Which of transformers' causal language models work: each family as a tiny random model, from its own folder.

    python benchmarks/families.py                    all families, a table in Markdown
    python benchmarks/families.py --only llama bloom
    python benchmarks/families.py --write docs/models.md

A family works when its model, saved and read by raysweep in two shards, gives the whole model's logits, can be
pruned by Wanda and SparseGPT with the counts that were asked for, and reconstructs its blocks (its attention
and MLP halves, where it has such) to a lower loss, behind routers with weights alone. Otherwise the table says
why not: the message with which raysweep refuses it, or what transformers needs that a tiny configuration has
not.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from raysweep.errors import UsageError, first_line  # noqa: E402
from raysweep.model.checkpoint import ModelSource  # noqa: E402
from raysweep.model.shape_reading import read_shape  # noqa: E402
from raysweep.model.shard import ModelShard  # noqa: E402
from raysweep.pruning.recipe import MaskRecipe  # noqa: E402
from raysweep.reconstruction.range import BlockRange  # noqa: E402
from tests.reconstruction.ranges import pass_text, reconstruct_trial, recover_all  # noqa: E402
from tests.zoo import make_zoo_model  # noqa: E402

IDS = torch.randint(3, 60, (7, 16), generator=torch.Generator().manual_seed(5))
SPARSITY = 0.37
HEADING = """# Which models work

Made by `benchmarks/families.py` with transformers {version}: every family that `AutoModelForCausalLM` knows, as a
random model of a few small blocks, saved and read back. *subblock* means that a block's attention and MLP half are
found, so that every granularity works; *block* that the halves cannot be told apart, so that `block`, `window:K`,
`model` and `matrix` do. Those with experts have them pruned one by one, routers never. *Not tried* are those of which
a generic tiny configuration makes no model: nothing is known of them here.

| family (`model_type`) | works | experts | why not, or not more |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Verdict:
    """works: subblock, block, or no;  reason: why not more"""

    family: str
    works: str
    experts: bool = False
    reason: str = ""

    def row(self) -> str:
        reason = self.reason.replace("|", "\\|").replace("\n", " ")
        return f"| {self.family} | {self.works} | {'yes' if self.experts else ''} | {reason} |"


class Wrong(Exception):
    """Numbers are not what they must be."""


def judge(family: str) -> Verdict:
    """What becomes of one family."""
    try:
        model = make_zoo_model(family)
        with torch.no_grad():
            expected = model(IDS, use_cache=False).logits
    except Exception as error:  # whatever a configuration that is too small ends in
        return Verdict(family, "not tried", reason=f"no tiny model of it: {first_line(error)}"[:160])
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except Exception as error:
            return Verdict(family, "not tried", reason=f"cannot be saved so small: {first_line(error)}"[:160])
        try:
            return _tried(family, ModelSource(folder), expected)
        except UsageError as error:
            return Verdict(family, "no", reason=error.what.replace(folder, "…"))
        except Wrong as error:
            return Verdict(family, "WRONG", reason=str(error))
        except Exception as error:
            return Verdict(family, "ERROR", reason=f"{type(error).__name__}: {first_line(error)}")


def _tried(family: str, source: ModelSource, expected: torch.Tensor) -> Verdict:
    cuts = pairwise(sorted({0, 1, len(read_shape(source).blocks)}))
    ranges = [BlockRange(ModelShard.load(source, *cut)) for cut in cuts]
    _compare_logits(ranges, expected)
    reason, granularity = "", "subblock"
    try:
        for blocks in ranges:
            for block in blocks.blocks.values():
                _ = block.halves
    except UsageError as error:
        granularity, reason = "block", error.what
    for blocks in ranges:
        blocks.keep_halves = granularity == "subblock"
    pass_text(ranges, "calibration", IDS)
    experts = any(block.routed for blocks in ranges for block in blocks.blocks.values())
    # A norm before a router moves its choices, which in a random model are near each other.
    trial = reconstruct_trial(
        granularity=granularity, learning_rate=0.001, epochs=3, trainable="weights" if experts else "all"
    )
    for blocks in ranges:
        _check_counts(blocks)
        results = recover_all(blocks, "trial", trial)
        if not all(result.loss_after < result.loss_before for result in results):
            raise Wrong("reconstruction raises the loss of a unit")
    return Verdict(family, granularity, experts, reason)


def _compare_logits(ranges: list[BlockRange], expected: torch.Tensor) -> None:
    with torch.no_grad():
        hidden = ranges[0].shard.embed(IDS)
        for blocks in ranges:
            for block in blocks.shard.blocks:
                hidden = block.run(hidden)
        logits = ranges[-1].shard.logits(hidden)
    if not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4):
        raise Wrong(
            f"logits differ from the whole model's by up to {float((logits - expected).abs().max()):.2g}"
        )


def _check_counts(blocks: BlockRange) -> None:
    for criterion, column_block in (("wanda", None), ("sparsegpt", 10**6)):
        fields: dict[str, Any] = {} if column_block is None else {"column_block": column_block}
        recipe = MaskRecipe.of(reconstruct_trial(criterion=criterion, sparsity=SPARSITY, **fields))
        for block in blocks.blocks.values():
            for name, linear in block.linears.items():
                layer = blocks.pruner.layer(recipe, block, linear)
                groups = layer.mask_OI if criterion == "wanda" else layer.mask_OI.reshape(1, -1)
                if not ((~groups).sum(1) == int(groups.shape[1] * SPARSITY)).all():
                    raise Wrong(f"{criterion} removes another count of {name}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=None, help="model types; default: all")
    parser.add_argument("--write", type=Path, default=None, help="a Markdown file for the table")
    options = parser.parse_args()
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    verdicts: list[Verdict] = []
    for family in options.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        began = time.perf_counter()
        verdicts.append(judge(family))
        print(f"{verdicts[-1].row()} {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    table = (
        HEADING.format(version=transformers.__version__) + "\n".join(each.row() for each in verdicts) + "\n"
    )
    if options.write is None:
        print(table)
    else:
        options.write.write_text(table, encoding="utf-8")
    return int(any(verdict.works in ("WRONG", "ERROR") for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
