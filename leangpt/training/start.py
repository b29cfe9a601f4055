"""What a training run starts from: fresh weights, its own checkpoint, nanoGPT's, published ones.

`init_from` decides which settings the command line still owns: shapes come with the weights,
everything else may be changed. A resumed run takes over the settings it was saved with; only what
this command gives is changed.
"""

from dataclasses import asdict, fields, replace

from leangpt.system.errors import UserError
from leangpt.system.runtime import DTYPES
from leangpt.training.checkpoint import model_from_checkpoint
from model import GPT, GPTConfig

# A resumed run is this machine's and this command's in these, whatever was saved.
PER_COMMAND = ("out_dir", "init_from", "data_dir", "device", "backend", "compile", "eval_only")
GPT2_VOCABULARY, GPT2_PADDED = 50257, 50304  # the latter is a multiple of 64: faster products


def resumed_settings(settings, given, checkpoint):
    """Settings to continue `checkpoint` with -> a new settings object.

    settings: as this command makes them; given: the names it set itself. A checkpoint of nanoGPT's
    `train.py` knows nothing of ours, so there this command's settings count, defaults included.
    """
    saved = checkpoint.get("config", {})
    if "optimizer_variant" not in saved:
        return settings
    known = {field.name for field in fields(settings)} - set(PER_COMMAND) - set(given)
    return replace(settings, **{name: value for name, value in saved.items() if name in known})


def build_model(settings, given, dataset, checkpoint=None):
    """The model a run starts with, on the CPU, its weights of `param_dtype` -> GPT.

    Weights are drawn or read in float32 and rounded last, so one seed starts every dtype alike.
    Raises UserError where the settings contradict the weights they start from.
    """
    free = {name: getattr(settings, name) for name in GPTConfig.FREE}
    if settings.init_from == "scratch":
        shape = {
            field.name: getattr(settings, field.name)
            for field in fields(GPTConfig)
            if hasattr(settings, field.name)
        }
        model = GPT(GPTConfig(**shape, vocab_size=padded_vocabulary(dataset.vocab_size)))
    elif settings.init_from == "resume":
        model = model_from_checkpoint(GPT, checkpoint, **free)
    else:
        from leangpt.weights.load import load_pretrained  # a large file, for this alone

        model = load_pretrained(settings.init_from, **free)
    if "block_size" in given and settings.block_size < model.config.block_size:
        model.crop_block_size(settings.block_size)
    return model.to(DTYPES[settings.param_dtype])


def padded_vocabulary(vocab_size):
    """GPT-2's vocabulary rounded up as nanoGPT does, any other as it is."""
    return GPT2_PADDED if vocab_size == GPT2_VOCABULARY else vocab_size


def adopt_model_args(settings, given, model):
    """`settings` with the shapes `model` really has -> a new settings object.

    Raises UserError where this command gave a shape that the weights do not have.
    """
    args = {name: value for name, value in asdict(model.config).items() if hasattr(settings, name)}
    if settings.init_from != "scratch":
        for name in sorted(set(given) & set(args)):
            wanted = getattr(settings, name)
            if wanted != args[name]:
                raise UserError(
                    f"{name}={wanted!r} contradicts the weights of init_from="
                    f"{settings.init_from!r}, which have {name}={args[name]!r}; leave it out"
                )
    return replace(settings, **args)


def check_dataset(dataset, model, checkpoint=None):
    """Raise UserError where the data set cannot train the model: other tokens, or too few."""
    saved = (checkpoint or {}).get("dataset", {})
    for key in ("tokenizer", "characters"):
        if key in saved and saved[key] != dataset.meta.get(key):
            raise UserError(
                f"the data set {dataset.name} has another vocabulary than "
                f"{saved['name']}, which the checkpoint was trained on"
            )
    have, need = model.config.vocab_size, dataset.vocab_size
    if not need <= have < need + 1024:  # a model's table may be padded
        raise UserError(
            f"the data set has {need} different tokens, the model {have}: they do not "
            "share a tokenizer; prepare the data with the model's"
        )
    for split in ("train", "val"):  # its first block, to be told if there is none
        next(dataset.full_split_batches(split, model.config.block_size, 1))
