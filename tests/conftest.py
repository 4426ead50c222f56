"""Fixtures for all tests: a tiny tokenizer, text and model made on the spot, and shared reference data."""

from __future__ import annotations

import copy
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysweep.config.space import SearchSpace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network, nor wait for one
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores

ROOT = Path(__file__).resolve().parents[1]
TINY_VOCABULARY = 128
TINY_POSITIONS = 64


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that the processes of `make test` end together."""
    items.sort(key=lambda item: "tests/sweep/" not in item.nodeid)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What raysweep keeps for later on a machine, the tests keep apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSWEEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout; the test is skipped where there is none."""
    folder = ROOT.parent / "shared"
    if not (folder / "reference").is_dir():
        pytest.skip("no ../shared with reference data")
    return folder


@pytest.fixture(scope="session")
def tiny_documents() -> list[str]:
    """Four hundred short documents of made-up prose, about 200,000 characters; no two are equal."""
    rng = random.Random(0)
    syllables = ["ka", "lo", "mi", "ren", "tu", "sa", "vel", "no", "di", "par"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(200)]
    return [
        f"{number}. " + "\n".join(" ".join(rng.choices(words, k=12)) for _ in range(rng.randint(2, 12)))
        for number in range(400)
    ]


@pytest.fixture(scope="session")
def tiny_text(tiny_documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.parquet (300 documents) and test.parquet (100 others), column `text`."""
    folder = tmp_path_factory.mktemp("tiny_text")
    pq.write_table(pa.table({"text": tiny_documents[:300]}), folder / "train.parquet")
    pq.write_table(pa.table({"text": tiny_documents[300:]}), folder / "test.parquet")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_documents: list[str]) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with 128 tokens that puts one BOS (id 1) in front of what it encodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    core.train_from_iterator(tiny_documents, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", unk_token="<unk>", model_max_length=TINY_POSITIONS
    )


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (4 blocks, hidden 32, grouped-query attention, float32) and the tokenizer.

    Its weights are large enough that every block changes the residual stream by about its own size, and that
    the logits are far from uniform; norm weights differ from one.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_POSITIONS,
        initializer_range=0.25,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp("tiny_llama")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def space_dict(tiny_llama: Path, tiny_text: Path) -> dict[str, Any]:
    """Two criteria, pruned only and reconstructed at every granularity: eight trials and the dense model."""
    return {
        "name": "tiny",
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "calibration": {"dataset": str(tiny_text), "num_samples": 6, "sequence_length": 32},
        "validation": {"samples": 3},
        "evaluation": {
            "perplexity": [
                {"name": "test", "dataset": str(tiny_text), "sequence_length": 32, "max_windows": 5},
                {"name": "short", "dataset": str(tiny_text), "sequence_length": 16, "max_windows": 3},
            ]
        },
        "sweep": [
            {"recovery": "none", "criterion": ["magnitude", "wanda"], "sparsity": 0.5},
            {
                "recovery": "reconstruct",
                "criterion": ["magnitude", "wanda"],
                "sparsity": 0.5,
                "granularity": ["matrix", "subblock", "block"],
                "learning_rate": 0.01,
            },
        ],
    }


@pytest.fixture
def make_space(space_dict: dict[str, Any]) -> Callable[..., SearchSpace]:
    """The small space with some sections changed: `make_space(calibration={"seed": [0, 1]})`."""

    def make(**changes: Any) -> SearchSpace:
        data = copy.deepcopy(space_dict)
        for section, change in changes.items():
            if isinstance(change, dict):
                data.setdefault(section, {}).update(change)
            else:
                data[section] = change
        return SearchSpace.from_dict(data)

    return make


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own with room for little."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={4 << 20}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
