"""A Llama trained whole on one card, as train.py runs it: seconds, peaks of GPU and host, MFU.

    python -m experiments.scale.llama_one_card --cases=8b_24gb,8b_128k
    python -m experiments.scale.llama_one_card --cases=tiny --device=cpu

Each case is a run of train.py in a process of its own: a config of config/, a folder of random
weights of a Llama's shape (made on the spot, in shards of bfloat16), random tokens. A smaller card
is meant by a limit on what CUDA's allocator may take, less CONTEXT for what the driver takes.

Writes a row a case to results/llama_one_card.csv: the median step beyond the first two, the
allocator's exact peak, the host's resident peak, seconds of loading and saving, and the share of
PEAK_FLOPS that 6 N T + 6 T^2 C L (causal) come to.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import parse_config
from experiments.shared.common import RESULTS, ROOT, provenance, read_csv, write_csv
from leangpt.system.errors import RunError, UserError, exit_cleanly
from leangpt.text.folder import write_dataset

CONTEXT = 0.6e9  # bytes of a card that CUDA's context takes
PEAK_FLOPS = 989e12  # of an H100 in bfloat16
LLAMAS = {  # name: (layers, width, heads, key/value heads, head size, inside the MLP, V, tied)
    "8b": (32, 4096, 32, 8, 128, 14336, 128256, False),
    "3b": (28, 3072, 24, 8, 128, 8192, 128256, True),
    "1b": (16, 2048, 32, 8, 64, 8192, 128256, True),
    "tiny": (2, 64, 4, 2, 16, 96, 512, False),
}
CASES = {  # name: (Llama, config, GB of the card, other flags)
    "8b_24gb": ("8b", "llama8b_24gb", 25.77, ()),
    "3b_12gb": ("3b", "llama8b_24gb", 12.88, ()),
    "1b_8gb": ("1b", "llama8b_24gb", 8.59, ()),
    "8b_8k_adamsn8": ("8b", "llama8b_24gb", None, ("--optimizer_variant=adamsn8",
                      "--offload=False")),
    "8b_8k_muonsn8": ("8b", "llama8b_24gb", None, ("--optimizer_variant=muonsn8",
                      "--offload=False")),
    "8b_128k": ("8b", "llama8b_long", None, ("--block_size=131072",)),
    "8b_512k": ("8b", "llama8b_long", None, ()),
    "tiny": ("tiny", "llama8b_24gb", None, ("--block_size=64", "--offload=False")),
}  # fmt: skip


@dataclass
class Settings:
    cases: str = "8b_24gb"  # of the table above, by commas
    steps: int = 6  # iterations of each run
    folder: str = ""  # where weights and runs go; "": a temporary one
    device: str = "cuda"  # cuda | cpu
    out: str = str(RESULTS / "llama_one_card.csv")  # the row of a case takes the older one's place

    def __post_init__(self):
        if unknown := set(self.cases.split(",")) - set(CASES):
            raise UserError(f"unknown cases {', '.join(sorted(unknown))}: {', '.join(CASES)}")
        if self.steps < 3:
            raise UserError("steps must be at least 3: the first two are not counted")


def write_llama(folder, name, seed=0):
    """A folder with config.json and a shard a layer of random bfloat16 weights -> parameters."""
    from safetensors.torch import save_file

    L, C, H, G, D, F, V, tied = LLAMAS[name]
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=V, hidden_size=C,
        intermediate_size=F, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=G,
        head_dim=D, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0,
        hidden_act="silu", tie_word_embeddings=tied, torch_dtype="bfloat16",
    )  # fmt: skip
    layer = {
        "input_layernorm": (C,), "post_attention_layernorm": (C,),
        "self_attn.q_proj": (H * D, C), "self_attn.k_proj": (G * D, C),
        "self_attn.v_proj": (G * D, C), "self_attn.o_proj": (C, H * D),
        "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F),
    }  # fmt: skip
    shards = [{f"model.layers.{i}.{part}": shape for part, shape in layer.items()}
              for i in range(L)]  # fmt: skip
    shards += [{"model.embed_tokens": (V, C), "model.norm": (C,)}]
    shards += [] if tied else [{"lm_head": (V, C)}]
    weight_map, count = {}, 0
    generator = torch.Generator().manual_seed(seed)
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for part, shape in shapes.items():
            tensor = torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 2:
                tensor.normal_(0, 0.02, generator=generator)
            tensors[f"{part}.weight"] = tensor
            count += tensor.numel()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return count


def write_tokens(data_dir, vocab_size, T, steps):
    """data_dir/random: enough random tokens for `steps` sequences."""
    random = np.random.default_rng(0)
    train = random.integers(0, vocab_size, T * (steps + 1) + 1, dtype=np.int64)
    val = random.integers(0, vocab_size, T + 1, dtype=np.int64)
    words = {"tokenizer": "gpt2", "vocab_size": vocab_size, "source": "random numbers"}
    write_dataset(data_dir / "random", train, val, words)


def block_size_of(config, flags):
    """Tokens of a sequence, as a flag or the config says."""
    found = [flag for flag in flags if flag.startswith("--block_size=")]
    if found:
        return int(found[-1].split("=")[1])
    names = {}
    exec((ROOT / "config" / f"{config}.py").read_text(), names)
    return names["block_size"]


def run_case(name, settings, place):
    """One case -> its row."""
    llama, config, card, flags = CASES[name]
    weights, T = place / llama, block_size_of(config, flags)
    began = time.perf_counter()
    if not (weights / "config.json").exists():
        write_llama(weights, llama)
    made = time.perf_counter() - began
    write_tokens(place / name / "data", LLAMAS[llama][6], T, settings.steps)
    out = place / name / "out"
    command = [
        sys.executable, "train.py", f"config/{config}.py", *flags, f"--init_from={weights}",
        f"--data_dir={place / name / 'data'}", "--dataset=random", f"--out_dir={out}",
        "--overwrite=True", f"--device={settings.device}", f"--max_iters={settings.steps}",
        "--eval_interval=0", "--eval_iters=1", "--log_interval=1",
    ]  # fmt: skip
    env = dict(os.environ)
    if card and settings.device == "cuda":
        share = (card * 1e9 - CONTEXT) / torch.cuda.get_device_properties(0).total_memory
        env["PYTORCH_CUDA_ALLOC_CONF"] = (
            f"expandable_segments:True,per_process_memory_fraction:{share:.4f}"
        )
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    wall = time.perf_counter() - began
    if done.returncode not in (0, 1):
        raise RunError(f"{name}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    rows = read_csv(out / "metrics.csv") if (out / "metrics.csv").exists() else []
    steps = [row for row in rows if row["loss"] is not None]
    L, C = LLAMAS[llama][:2]
    facts = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {}
    N = facts.get("parameters")
    seconds = statistics.median(r["ms"] for r in steps[2:]) / 1000 if len(steps) > 2 else None
    flops = 6 * N * T + 6 * T * T * C * L if N else None
    peaks = [row["peak_mb"] for row in steps if row["peak_mb"] is not None]
    return dict(
        case=name,
        parameters=N,
        T=T,
        card_gb=card,
        flags=" ".join(flags),
        step_s=None if seconds is None else round(seconds, 3),
        tokens_per_s=None if seconds is None else round(T / seconds, 1),
        mfu=round(flops / seconds / PEAK_FLOPS, 4) if seconds and flops else None,
        gpu_peak_gb=round(max(peaks) / 1000, 3) if peaks else None,
        host_peak_gb=round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
        weights_s=round(made, 1),
        other_s=round(wall - sum(row["ms"] for row in steps) / 1000, 1),
        loss=steps[-1]["loss"] if steps else None,
        outcome="" if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:120],
        **provenance(settings.device),
    )


def main(argv=None):
    settings, _ = parse_config(Settings, argv)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(settings.folder or temporary).resolve()
        for name in settings.cases.split(","):
            row, out = run_case(name, settings, place), Path(settings.out)
            rows = [r for r in (read_csv(out) if out.exists() else []) if r["case"] != name]
            write_csv(out, [*rows, row])
            print(", ".join(f"{key} {value}" for key, value in row.items() if value), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
