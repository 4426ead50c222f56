"""Turns trained weights into the Hugging Face folder of builtin:pystdlib and checks that transformers agrees.

python benchmarks/builtin_model/export.py --weights .builtin-data/trained/best.pt
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from corpus import PACKAGE
from network import CONFIG, LanguageModel
from safetensors.torch import save_file
from train import load_tokens
from transformers import AutoModelForCausalLM

GENERATION = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
TOLERANCE = 1e-4  # relative, on the loss of one batch in float32


def write_folder(weights: Path, folder: Path) -> None:
    """Writes configuration and bf16 weights beside the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    state = torch.load(weights, map_location="cpu", weights_only=True)
    save_file(
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def losses(folder: Path, weights: Path, data: Path) -> tuple[float, float]:
    """Loss of the same validation windows by the training network and by transformers, both float32."""
    tokens = load_tokens(data, "validation", "cpu")[: 8 * 257].view(8, 257)
    network = LanguageModel().eval()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    shipped = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = network(tokens[:, :-1], tokens[:, 1:]).mean(), shipped(tokens, labels=tokens).loss
    return float(ours), float(theirs)


def main() -> None:
    """Writes the folder; ends with an error when the two implementations disagree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(".builtin-data"))
    arguments = parser.parse_args()
    folder = PACKAGE / "model"
    write_folder(arguments.weights, folder)
    ours, theirs = losses(folder, arguments.weights, arguments.data)
    print(f"loss of one batch: training network {ours:.6f}, transformers {theirs:.6f}")
    if abs(ours - theirs) > TOLERANCE * theirs:
        raise SystemExit("The exported folder does not compute what was trained.")


if __name__ == "__main__":
    main()
