"""Real weights in our model: do the logits equal those of `transformers`?

    python data/smollm2/prepare.py && python -m experiments.decoding.pretrained_check

SmolLM2-135M-Instruct from its GGUF file (Q4_1, dequantised to float32), over the text below:
  gguf      transformers reads the same GGUF file with its own reader;
  exported  transformers reads the folder that our export wrote from our model.
Then whether its tokenizer and ours give the same tokens, and the greedy answers to a prompt, bare
and in the model's chat format. Writes results/pretrained_check.csv. Needs transformers and
accelerate (pip install transformers accelerate), about 3 GB of memory and a minute.
"""

import logging
import tempfile
from pathlib import Path

import torch

from experiments.shared.common import RESULTS, ROOT, provenance, write_csv
from leangpt.system.errors import UserError, exit_cleanly
from leangpt.weights.chat_text import load_pretrained_text
from leangpt.weights.export import export_pretrained
from leangpt.weights.load import load_pretrained
from model import GPT

FOLDER = ROOT / "data" / "smollm2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = {"bare": "The capital of France is", "chat": "What is the capital of France?"}
TEXT = """\
A glacier is a river that has forgotten how to hurry. Snow falls on high ground faster than the
summer can melt it; year after year the layers settle, press the air out of one another, and turn
to ice that is blue where it is deepest. Under its own weight the ice begins to flow, a few
centimetres a day, around 1,000 metres in a lifetime. It carries boulders the size of houses and
grinds rock to a flour so fine that the lakes below turn milky green. In 1991 two hikers found a
man in the ice between Austria and Italy. He had lain there for 5,300 years, with his copper axe,
his bow of yew and the seeds of his last meal. Nothing else we have keeps such a patient diary:
bubbles in the ice hold the air of 800,000 years, and when we drill down and let them out, we can
read how much carbon dioxide the world breathed before there was anyone to ask.
"""


def main():
    try:
        import accelerate  # noqa: F401  transformers reads GGUF files with its help
        import transformers
    except ImportError:
        raise UserError("this check needs: pip install transformers accelerate") from None
    if not (FOLDER / MODEL).exists():
        raise UserError("SmolLM2 is not there; first: python data/smollm2/prepare.py")
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    text = load_pretrained_text(FOLDER)
    model = load_pretrained(GPT, FOLDER)
    idx = torch.tensor([text.tokenizer.encode(TEXT)])
    with torch.inference_mode():
        ours = model(idx)[0][0]
    rows = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as bare:
        (Path(bare) / MODEL).symlink_to(FOLDER / MODEL)  # the file without our tokenizer.json
        export_pretrained(model, folder)
        sources = {"gguf": (bare, {"gguf_file": MODEL}), "exported": (folder, {})}
        for name, (place, options) in sources.items():
            theirs = transformers.AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32, attn_implementation="eager", **options
            ).eval()
            with torch.inference_mode():
                rows.append(compare(name, ours, theirs(idx).logits[0], idx[0]))
            del theirs
        tokenizer = transformers.AutoTokenizer.from_pretrained(bare, gguf_file=MODEL)
    same = tokenizer.encode(TEXT) == idx[0].tolist()
    rows.append(
        {"check": "tokenizer", "tokens": idx.size(1), "answer": "equal" if same else "different"}
    )
    for name, prompt in PROMPTS.items():
        prompt = text.chat(prompt) if name == "chat" else prompt
        rows.append({"check": name, "answer": greedy(model, text, prompt)})
    columns = [
        "check",
        "tokens",
        "max_abs_error",
        "rms_logit",
        "top1_agreement",
        "loss_ours",
        "loss_transformers",
        "answer",
    ]
    about = {**provenance(), "transformers": transformers.__version__}
    rows = [{column: row.get(column, "") for column in columns} | about for row in rows]
    for row in rows:
        print("  ".join(f"{key}={row[key]}" for key in columns if row[key] != ""))
    write_csv(RESULTS / "pretrained_check.csv", rows)


def compare(name, ours, theirs, idx):
    """A row comparing two (T, V) logits of the tokens idx (T,)."""

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[:-1], idx[1:]).item()

    return {
        "check": name,
        "tokens": len(idx),
        "max_abs_error": f"{(ours - theirs).abs().max().item():.2e}",
        "rms_logit": f"{theirs.square().mean().sqrt().item():.3f}",
        "top1_agreement": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        "loss_ours": f"{loss(ours):.6f}",
        "loss_transformers": f"{loss(theirs):.6f}",
    }


@torch.inference_mode()
def greedy(model, text, prompt, max_new_tokens=8):
    """The most likely continuation of prompt (str), up to a stop token."""
    idx = torch.tensor([text.tokenizer.encode(prompt)])
    start = idx.size(1)
    for _ in range(max_new_tokens):
        token = model(idx)[0][:, -1].argmax(-1, keepdim=True)
        if token.item() in text.stop_tokens:
            break
        idx = torch.cat((idx, token), dim=1)
    return " ".join(text.tokenizer.decode(idx[0, start:].tolist()).split())


if __name__ == "__main__":
    exit_cleanly(main)
