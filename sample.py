"""Write text with a trained or published model: `python sample.py --out_dir=out-shakespeare-char`.

    python sample.py --init_from=gpt2 --start="What is the answer to life?" --top_p=0.9
    python sample.py --init_from=gpt2-xl --int4=True --save_int4=gpt2-xl-int4.safetensors
    python sample.py --init_from=gpt2-xl-int4.safetensors --stream=True --start=FILE:prompt.txt
    python sample.py --init_from=data/smollm2 --chat

Every model decodes from a KV cache (leangpt/kv_cache/cache.py). All samples are written at
once, as a batch; with --stream=True one after another, as they come. Ends with tokens a second
beside the bytes of weights and cache that each step has to read, which is what limits it.
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from attention_policies import POLICIES
from configurator import parse_config
from leangpt.decoding.chat import chat
from leangpt.decoding.conversation import Conversation
from leangpt.decoding.generate import bytes_read, check_count, generate
from leangpt.decoding.printer import Printer, until_stop
from leangpt.decoding.sampling import Sampler
from leangpt.int4.calibration import quantize_gpt_
from leangpt.int4.files import load_int4, save_int4
from leangpt.int4.kept import read_or_round
from leangpt.int4.quantize import int4_layers, linears_of, storage_bits
from leangpt.int4.stored import STORED_GROUP, take_stored_
from leangpt.int4.tuning import quantize_and_tune_
from leangpt.layers.int4_linear import GROUP_SIZES
from leangpt.runs.checkpoint import checkpoint_to_resume, load_checkpoint, model_from_checkpoint
from leangpt.system.errors import UserError, exit_cleanly, named_as_typed, refused
from leangpt.system.reading import file_with_an_end
from leangpt.system.runtime import setup_runtime
from leangpt.text.model_text import ModelText, files_to_export, text_of_data, text_of_files
from leangpt.weights.chat_text import load_pretrained_text
from leangpt.weights.export import export_pretrained
from leangpt.weights.find import find_pretrained
from leangpt.weights.gguf_export import export_gguf
from model import GPT

RULE = "-" * 15  # between samples, as nanoGPT prints it
MOST_AT_ONCE = 2**20  # samples: as many as plan.py plans for


@dataclass
class Settings:
    """Which model, which text to go on from, and how."""

    # the model
    init_from: str = "resume"  # resume | gpt2* | a hub id, folder, .gguf, 4-bit .safetensors
    out_dir: str = "out"  # where ckpt.pt is, for init_from=resume
    data_dir: str = "data"  # data sets, for a checkpoint that does not carry its tokenizer
    attention_policy: str | None = field(
        default=None,
        metadata={"alias": "policy", "help": f"{' | '.join(POLICIES)}; None: as trained"},
    )
    q_chunk: int | None = None  # rows of the prompt per tile; None: as trained
    k_chunk: int | None = None  # key/value rows per tile; None: as trained
    n_kv_head: int | None = field(
        default=None, metadata={"alias": "kv_heads", "help": "as the weights have, or an error"}
    )
    int4: bool = False  # pack the linear layers' weights in 4 bits
    group_size: int = 32  # weights that share a scale in 4 bits: 32 | 64 | 128
    int4_tune: int = 0  # steps that fit 4-bit scales to the exact model's predictions, e.g. 600
    save_int4: str | None = None  # write the 4-bit model to this .safetensors file
    export: str | None = None  # write the model to this folder, or .gguf file, and stop
    export_type: str = "F16"  # of a .gguf file's matrices: F32 | F16 | Q8_0
    # the text
    start: str = "\n"  # the prompt, or FILE:prompt.txt
    chat: bool = False  # start is a message in the model's chat format; without start: a chat
    num_samples: int = 10  # texts to write
    max_new_tokens: int = 500  # tokens in each
    temperature: float = 0.8  # 1.0: the model's distribution; less is bolder; 0: most likely token
    top_k: int | None = 200  # choose among the k most likely tokens; None: all
    top_p: float | None = None  # choose among the fewest tokens of this probability; None: all
    seed: int = 1337  # of the choices
    stream: bool = False  # print tokens as they come
    # how it runs
    kv_bits: int | None = None  # 8 | 4: keys and values as integers; None: exact
    slide: int = 1  # learned positions, past block_size: tokens to drop each time (1: nanoGPT's)
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    compile: bool = field(
        default=False,
        metadata={"fixed": "a step is one C call or a captured CUDA graph, of kernels of our own"},
    )


OF_THE_TEXT = set(  # settings that an export does not heed
    "start chat num_samples max_new_tokens temperature top_k top_p stream kv_bits slide "
    "attention_policy q_chunk k_chunk".split()
)


def main(argv=None):
    """Parse, and do it."""
    settings, given = parse_config(Settings, argv)
    with named_as_typed(given.typed):
        run(settings, given)


def run(settings, given):
    """Load a model, then sample from it, export it or write it in 4 bits."""
    check(settings)
    talks = settings.chat and "start" not in given and not settings.export
    if talks and (unheeded := sorted({"num_samples", "slide"} & set(given))):
        raise UserError(f"{unheeded[0]} means nothing in a chat: leave it out, or give --start")
    prompt = read_prompt(settings.start)
    runtime = setup_runtime(settings.device, settings.dtype, settings.seed)
    dtype = runtime.dtype
    if settings.dtype == "auto" and runtime.device_type == "cpu" and is_4bit(settings):
        dtype = torch.bfloat16  # what the 4-bit kernel reads
    loaded = load(settings, dtype)
    model, text = loaded.model, loaded.text
    if settings.export:
        if unheeded := sorted(OF_THE_TEXT & set(given)):
            print(f"note: nothing is sampled, so {', '.join(unheeded)} mean nothing here")
        return export(model, text, settings)
    set_attention(model, settings)
    for note in text.notes:
        print(f"note: {note}")
    if talks:
        ids = text.chat_ids("Hi")  # has it a chat format, and is that one whole?
    else:
        ids = prompt_ids(text, prompt, settings.chat, "start" in given, model.config.block_size)
    if settings.int4:
        model = quantise(loaded, settings, runtime.device)
    model.to(runtime.device, dtype)
    parameters = sum(p.numel() for p in model.parameters()) + sum(
        layer.in_features * layer.out_features for layer in int4_layers(model).values()
    )
    packed = ""
    if is_4bit(settings):
        packed = f", 4-bit layers of {storage_bits(model):.3g} bits per weight"
    print(
        f"model: {parameters / 1e6:.1f}M parameters in {str(dtype).removeprefix('torch.')}"
        f"{packed}; attention policy {model.config.attention_policy}; {runtime.device} "
        f"({runtime.reason})"
    )
    if talks:
        return talk(model, text, settings, runtime)
    write(model, text, ids, settings, runtime)


def export(model, text, settings):
    """Write the model for others, with its text: a folder for transformers, or a GGUF file."""
    files = files_to_export(text)
    if settings.export.endswith(".gguf"):
        for note in export_gguf(model, settings.export, settings.export_type, files):
            print(f"note: {note}")
    else:
        export_pretrained(model, settings.export, files)
    print(f"exported to {settings.export}")


def check(settings):
    """Raise UserError for settings that no model could satisfy, before one is loaded."""
    check_count(settings.max_new_tokens)
    Sampler(settings.temperature, settings.top_k, settings.top_p)
    if settings.num_samples <= 0:
        raise UserError(f"num_samples must be positive, not {settings.num_samples}")
    if settings.num_samples > MOST_AT_ONCE and not settings.stream:  # one by one
        raise UserError(
            f"num_samples must be at most {MOST_AT_ONCE:,} at once, not {settings.num_samples:,}"
        )
    if settings.kv_bits not in (None, 8, 4):
        raise UserError(f"kv_bits={settings.kv_bits}: use 8, 4, or None for an exact cache")
    if settings.group_size not in GROUP_SIZES:
        raise UserError(f"group_size={settings.group_size}: use 32, 64 or 128")
    for name in ("save_int4", "int4_tune"):
        if getattr(settings, name) and not settings.int4:
            raise UserError(f"{name} needs --int4=True")
    if settings.int4_tune < 0:
        raise UserError(f"int4_tune={settings.int4_tune}: a number of steps, or 0 for none")
    if settings.export and settings.int4:
        raise UserError("export writes float weights; leave out int4")


def is_4bit(settings):
    """Will the linear layers be in 4 bits?"""
    return settings.int4 or settings.init_from.endswith(".safetensors")


def read_prompt(start):
    """The prompt's text: `start` itself, or the content of the file it names."""
    if not start.startswith("FILE:"):
        try:  # bytes that a terminal of another encoding than UTF-8 has made surrogates
            return start.encode(errors="surrogateescape").decode()
        except UnicodeError:
            raise UserError("--start is not UTF-8 text") from None
    path = start.removeprefix("FILE:")
    if not path:
        raise UserError("--start=FILE: names no file")
    try:
        return file_with_an_end(path).read_text(encoding="utf-8-sig")  # without a byte order mark
    except OSError as error:
        raise refused(f"cannot read the prompt {path}", error) from None
    except UnicodeDecodeError:
        raise UserError(f"the prompt {path} is not UTF-8 text") from None


def prompt_ids(text, prompt, chat, given, block_size):
    """The prompt's tokens (list[int]), in the model's chat format or not. Raises UserError for one
    that is empty or too long. The default prompt, not `given`, is one that the model can read."""
    if not given and not chat:
        try:
            text.tokenizer.encode(prompt)
        except UserError:
            lacking, prompt = prompt, text.tokenizer.pieces()[0]
            print(f"note: the vocabulary lacks {lacking!r}: the text begins with {prompt!r}")
    ids = text.chat_ids(prompt) if chat else text.tokenizer.encode(prompt)
    if not ids and prompt:
        what = "chat format" if chat else "tokenizer"
        raise UserError(f"the model's {what} makes no tokens of the prompt")
    if not prompt:  # an empty message in a chat's format is no empty text
        raise UserError("the prompt is empty: give --start at least one character")
    if len(ids) > block_size:
        raise UserError(
            f"the prompt has {len(ids)} tokens, the model reads at most block_size={block_size}: "
            "shorten it"
        )
    return ids


@dataclass
class Loaded:
    """A model, its text, and where the text came from: one of the last two."""

    model: GPT  # on the CPU
    text: ModelText
    source: str | Path  # the file or folder that the model came from, or a hub id
    pretrained: str | None = None  # the name of a published model
    dataset: dict | None = None  # meta.json of the data set that the model was trained on

    def notes(self):
        """What a 4-bit file says of the text, a dict for save_int4; see text_of."""
        if self.pretrained:
            return {"init_from": self.pretrained, "text_files": files_to_export(self.text)}
        return {"dataset": self.dataset, "text_files": self.text.files}


def load(settings, dtype):
    """What init_from names -> Loaded."""
    source = settings.init_from
    if source == "resume":
        path = Path(settings.out_dir) / "ckpt.pt"
        path = path if path.exists() else checkpoint_to_resume(path.parent)
        checkpoint = load_checkpoint(path)
        dataset = checkpoint.get("dataset")
        if dataset is None:  # nanoGPT's own checkpoints name the data set only
            name = checkpoint.get("config", {}).get("dataset")
            folder = {"folder": str(Path(settings.data_dir) / name)} if name else None
            dataset = folder or {"tokenizer": "gpt2"}
            if folder is None:
                print(
                    "note: the checkpoint names no data set: GPT-2's tokens are taken, as nanoGPT"
                )
        model = model_from_checkpoint(GPT, checkpoint).eval()
        text = text_of(checkpoint.get("text_files"), dataset=dataset)
        return Loaded(model, text, path, dataset=dataset)
    if source.endswith(".safetensors"):
        if settings.int4:
            raise UserError(f"{source} is in 4 bits already; leave out int4")
        model, notes = load_int4(GPT, source, dtype=dtype)
        pretrained, dataset = notes.get("init_from"), notes.get("dataset") or {}
        text = text_of(notes.get("text_files"), pretrained, dataset)
        return Loaded(model, text, source, pretrained, dataset)
    exact = torch.float32 if settings.int4 else dtype  # round once, from the best there is
    model = GPT.from_pretrained(source, dtype=exact)
    return Loaded(model, text_of(pretrained=source), source, pretrained=source)


def text_of(files=None, pretrained=None, dataset=None):
    """A model's text: the files it carries, or what a published one came with, or a data set's."""
    if files:
        return text_of_files(files, "the model's own text")
    if pretrained:
        return load_pretrained_text(pretrained)
    return text_of_data(dataset.get("folder", dataset))


def set_attention(model, settings):
    """Run the model's weights under the settings' attention policy and tiles."""
    names = ("attention_policy", "q_chunk", "k_chunk")
    changes = {n: value for n in names if (value := getattr(settings, n)) is not None}
    heads, policy = model.config.kv_heads, settings.attention_policy
    changed = replace(model.config, **changes)  # which checks them
    if changed.kv_heads != heads:
        raise UserError(
            f"attention_policy={policy!r} needs weights trained with fewer key/value "
            "heads than heads; these have as many: use cache or recompute"
        )
    if settings.n_kv_head not in (None, heads):
        raise UserError(f"n_kv_head={settings.n_kv_head}: the model's weights have {heads}")
    for config in (model.config, *(block.config for block in model.transformer.h)):  # or the same
        for name, value in changes.items():
            setattr(config, name, value)


def quantise(loaded, settings, device):
    """The model packed in 4 bits, on the device: as it was kept beside the exact one, or rounded on
    a text of its own. Saved once more if asked to."""

    def round_(model):
        if not settings.int4_tune:
            if loaded.pretrained and settings.group_size == STORED_GROUP:
                if taken := take_stored_(model, find_pretrained(loaded.pretrained)):
                    print(f"{len(taken)} layers keep the 4-bit codes of {loaded.pretrained}")
            if linears_of(model, settings.group_size):
                quantize_gpt_(model, settings.group_size)
            return
        before, after = quantize_and_tune_(
            model, settings.group_size, settings.int4_tune, report=say_tuning
        )
        print(
            f"fitted: {before:.5f} nats a token from the exact model before, {after:.5f} after"
            + ("" if after < before else "; left as rounded, more steps are needed")
        )

    loaded.model = read_or_round(
        loaded.model,
        loaded.source,
        round_,
        settings.group_size,
        settings.int4_tune,
        loaded.notes(),
        device,
    )
    if settings.save_int4:
        save_int4(loaded.model, settings.save_int4, loaded.notes())
        size = Path(settings.save_int4).stat().st_size
        print(f"saved {settings.save_int4} ({size / 1e6:.1f} MB); next time give it as init_from")
    return loaded.model


def say_tuning(step, steps, divergence):
    """A line ten times on the way."""
    if (step + 1) % max(1, steps // 10) == 0:
        print(
            f"fitting 4-bit scales, step {step + 1} of {steps}: {divergence:.5f} nats a token "
            "from the exact model",
            flush=True,
        )


def talk(model, text, settings, runtime):
    """A chat on the terminal, and how fast it went."""
    generator = torch.Generator(runtime.device).manual_seed(settings.seed)
    sampler = Sampler(settings.temperature, settings.top_k, settings.top_p, generator, text.sampled)
    conversation = Conversation(model, sampler, text.stop_tokens, settings.kv_bits)
    written = chat(conversation, text, settings.max_new_tokens)
    print(f"{conversation.read_tokens:,} tokens read, {written:,} written")


def write(model, text, ids, settings, runtime):
    """Print num_samples continuations of ids, then how fast they came."""
    generator = torch.Generator(runtime.device).manual_seed(settings.seed)
    at_once = 1 if settings.stream else settings.num_samples
    steps, seconds, warm_ups = 0, 0.0, []
    for _ in range(0, settings.num_samples, at_once):
        idx = torch.tensor([ids], device=runtime.device).repeat(at_once, 1)
        printer = None
        if settings.stream:
            printer = Printer(text.tokenizer, text.stop_tokens, ids, not settings.chat)
        runtime.synchronize()
        began = time.perf_counter()
        out = generate(
            model,
            idx,
            settings.max_new_tokens,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            text.stop_tokens,
            generator,
            settings.kv_bits,
            printer,
            slide=settings.slide,
            vocab_size=text.sampled,
            warmed=warm_ups.append,
        )
        runtime.synchronize()
        seconds += time.perf_counter() - began - warm_ups[-1]
        rows = [until_stop(row, len(ids), text.stop_tokens) for row in out.tolist()]
        steps += max(len(row) for row in rows) - len(ids)
        for row in rows:
            if printer is None:
                print(text.tokenizer.decode(row[len(ids) :] if settings.chat else row))
            else:
                printer.end()
            print(RULE)
    mean_length = len(ids) + steps / max(1, settings.num_samples // at_once) / 2
    weights, cache = bytes_read(model, mean_length, settings.kv_bits)
    read = (weights + at_once * cache) * steps / seconds
    print(
        f"{steps * at_once / seconds:,.1f} tokens/s, prompts included "
        f"({at_once} at once, {seconds:.2f} s after {sum(warm_ups):.2f} s of warming up); a step "
        f"reads {weights / 1e6:,.1f} MB of weights and {at_once * cache / 1e6:,.1f} MB of cache: "
        f"{read / 1e9:,.1f} GB/s"
    )


if __name__ == "__main__":
    exit_cleanly(main)
