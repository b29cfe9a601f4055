"""The peak of training a Hugging Face Llama's layers, as they are and in row tiles.

    python -m experiments.attention.hf_llama_tiles      -> experiments/results/hf_llama_tiles.csv

One forward and backward of LlamaModel (no head: its logits are another matter), float32, on the
CPU, one sequence. The peak is the allocator's, beyond weights and input: activations and the
gradients of the layers, whose size stands beside it. `checkpointed` is the library's own gradient
checkpointing. The error is that of the hidden states and of the gradients, each as a vector,
against the original's.
"""

from dataclasses import dataclass

import torch
import transformers

from configurator import parse_config
from experiments.shared.common import RESULTS, provenance, write_csv
from leangpt.attention import StoredRows, tile_layers
from leangpt.memory.meter import measure_peak, tensor_bytes
from leangpt.system.errors import exit_cleanly

MIB = 2**20


@dataclass
class Settings:
    length: int = 8192  # tokens of the one sequence
    layers: int = 4
    width: int = 512  # channels; 64 a head, four heads to a key/value head
    q_chunk: int = 1024  # rows per tile
    out: str = str(RESULTS / "hf_llama_tiles.csv")  # where the rows go


CONTESTANTS = {
    "original": lambda model, settings: model,
    "checkpointed": lambda model, settings: model.gradient_checkpointing_enable(),
    "tiled, attention's output kept": lambda model, settings: tile_layers(
        model, settings.q_chunk, checkpoint_layers=False
    ),
    "tiled, keys and values kept": lambda model, settings: tile_layers(
        model, settings.q_chunk, source=StoredRows
    ),
    "tiled": lambda model, settings: tile_layers(model, settings.q_chunk),
}


def build(settings):
    heads = settings.width // 64
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=settings.width,
        intermediate_size=settings.width * 8 // 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=settings.length,
    )
    torch.manual_seed(0)
    return transformers.LlamaModel(config).train()


def measure(settings, prepare):
    """(peak bytes, hidden states, gradients of the layers as one vector, their bytes)."""
    model = build(settings)
    prepare(model, settings)
    layers = [p for p in model.layers.parameters()]
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(256, (1, settings.length), generator=generator)
    weights = torch.randn(settings.length, settings.width, generator=generator)
    kept = []

    def step():
        hidden = model(idx).last_hidden_state
        kept[:] = [hidden.detach()]
        (hidden * weights).sum().backward()

    peak = measure_peak(step)
    return peak, kept[0], torch.cat([p.grad.flatten() for p in layers]), tensor_bytes(layers)


def error(found, expected):
    return float(f"{float((found - expected).norm() / expected.norm()):.2g}")


def main():
    settings, _ = parse_config(Settings)
    rows, reference = [], None
    for name, prepare in CONTESTANTS.items():
        peak, hidden, gradients, size = measure(settings, prepare)
        reference = reference or (hidden, gradients)
        rows.append(
            {
                "name": name,
                "T": settings.length,
                "layers": settings.layers,
                "width": settings.width,
                "q_chunk": settings.q_chunk if name.startswith("tiled") else None,
                "peak_MB": round(peak / MIB, 1),
                "gradients_MB": round(size / MIB, 1),
                "out_error": error(hidden, reference[0]),
                "grad_error": error(gradients, reference[1]),
                "transformers": transformers.__version__,
                **provenance(),
            }
        )
        print(rows[-1], flush=True)
        write_csv(settings.out, rows)


if __name__ == "__main__":
    exit_cleanly(main)
