"""The whole loop at tiny size: conversations, training, losses, an answer, export, transformers."""

import pytest
import torch
from tiny_run import run_script

from leangpt.weights.chat_text import load_pretrained_text
from model import GPT

pytest.importorskip("tokenizers")
from chat_files import CHATS, prepare, text_files  # noqa: E402

transformers = pytest.importorskip("transformers")


def tiny_model(folder):
    """A random Qwen3 with a tokenizer and a chat format, as transformers writes it."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    for name, content in text_files().items():
        (folder / name).write_text(content)


def run(*command):
    done = run_script(*map(str, command))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_conversations_to_transformers(tmp_path):
    model, tuned, out = tmp_path / "model", tmp_path / "tuned", tmp_path / "out"
    model.mkdir()
    tiny_model(model)
    done = prepare(tmp_path)
    assert done.returncode == 0, done.stderr
    flags = [f"--data_dir={tmp_path / 'data'}", "--dataset=mine", "--block_size=69"]
    flags += ["--device=cpu", "--eval_interval=30", "--max_iters=60", "--warmup_iters=5"]
    flags += ["--batch_size=4", "--gradient_accumulation_steps=2", "--learning_rate=1e-2"]
    low = ["--param_dtype=bfloat16", "--optimizer_variant=muonsn8"]
    low += ["--optimizer_options=gradient_bits=8"]
    said = run("train.py", f"--init_from={model}", f"--out_dir={out}", *flags, *low)
    losses = [line for line in said.splitlines() if "val loss" in line]
    first, last = (
        float(line.split("val loss ")[1].split()[0].strip(",")) for line in (losses[0], losses[-2])
    )
    assert last < first - 2

    answer = run(
        "sample.py",
        f"--out_dir={out}",
        "--chat=True",
        "--start=Hi",
        "--num_samples=1",
        "--temperature=0",
        "--max_new_tokens=40",
        "--device=cpu",
    )
    assert "Zürich ☃" in answer  # and stops there
    assert answer.split("Zürich ☃")[1].startswith(("</s>\n", "\n"))

    run("sample.py", f"--out_dir={out}", f"--export={tuned}", "--device=cpu", "--dtype=float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).eval()
    assert theirs.config.model_type == "qwen3"
    assert theirs.config.max_position_embeddings == 128  # its context is still its own
    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
    ours, text = GPT.from_pretrained(tuned), load_pretrained_text(tuned)
    for messages in CHATS:
        ids = text.chat_ids(messages)
        assert (
            ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        )
        with torch.no_grad():
            idx = torch.tensor([ids])
            torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)
