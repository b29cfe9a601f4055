"""What a training run goes on from, and which settings the command line still owns then.

Shapes come with the weights, everything else may be changed. A resumed run takes over the settings
it was saved with; only what this command gives is changed.
"""

from dataclasses import asdict, fields, replace

from leangpt.optim.resume import load_optimizer
from leangpt.system.errors import UserError
from leangpt.system.reading import check_fields
from leangpt.text.model_text import other_meaning, text_of_files
from leangpt.weights.chat_text import load_pretrained_text
from leangpt.weights.find import GPT2_SIZES

# A resumed run is this machine's and this command's in these, whatever was saved.
PER_COMMAND = (
    "out_dir",
    "overwrite",
    "init_from",
    "data_dir",
    "device",
    "backend",
    "parallel",
    "context_parallel",
    "compile",
    "eval_only",
    "memory",
)


def resumed_settings(settings, given, checkpoint):
    """Settings to continue `checkpoint` with -> a new settings object.

    settings: as this command makes them; given: the names it set itself. A checkpoint of nanoGPT's
    `train.py` knows nothing of ours, so there this command's settings count, defaults included.
    """
    saved = checkpoint.get("config") or {}
    if "optimizer_variant" not in saved:
        return settings
    known = {field.name for field in fields(settings)} - set(PER_COMMAND) - set(given)
    saved = {name: value for name, value in saved.items() if name in known}
    check_fields(saved, type(settings), "the checkpoint's settings")
    return replace(settings, **saved)


def check_offload(settings, runtime):
    """Raise UserError for offload=True where the device's memory is the host's already."""
    if settings.offload and runtime.device_type != "cuda":
        raise UserError(
            f"offload=True moves layers' inputs from a GPU to the host, and this run is on "
            f"{runtime.device}: leave it out, or give --offload=False"
        )


def adopt_model_args(settings, given, model):
    """`settings` with the shapes `model` really has -> a new settings object.

    block_size remains where it is less than the context of a model with relative positions, and was
    given, now or by the run that is resumed. Raises UserError where this command gave a shape that
    the weights do not have.
    """
    args = {name: value for name, value in asdict(model.config).items() if hasattr(settings, name)}
    args["block_size"] = adopted_block_size(settings, given, model.config)
    if settings.init_from != "scratch":
        for name in sorted(set(given) & set(args)):
            wanted = getattr(settings, name)
            has = model.config.kv_heads if name == "n_kv_head" and wanted else args[name]
            if wanted != has:
                raise UserError(
                    f"{name}={wanted!r} contradicts the weights of init_from="
                    f"{settings.init_from!r}, which have {name}={has!r}; leave it out"
                )
    return replace(settings, **args)


def adopted_block_size(settings, given, config) -> int:
    """Tokens of a run's sequences: the model's context, or less of relative positions where that
    was given, now or by the run that is resumed."""
    given_once = "block_size" in given or settings.init_from == "resume"
    if config.position != "learned" and given_once:
        return min(settings.block_size, config.block_size)
    return config.block_size


def check_dataset(dataset, model, block_size, checkpoint=None, same_tokens=False):
    """Raise UserError where the data set cannot train the model: other tokens, or too few.

    same_tokens: that they mean the same to both is known (carried_text), so the model's table may
    be padded as far as it likes.
    """
    saved = (checkpoint or {}).get("dataset") or {}
    for key in ("tokenizer", "characters"):
        if key in saved and saved[key] != dataset.meta.get(key):
            raise UserError(
                f"the data set {dataset.name} has another vocabulary than "
                f"{saved.get('name', 'the one')}, which the checkpoint was trained on"
            )
    have, need = model.config.vocab_size, dataset.vocab_size
    if need > have or have >= need + 1024 and not same_tokens:
        raise UserError(
            f"the data set has {need} different tokens, the model {have}: they do not "
            "share a tokenizer; prepare the data with the model's"
        )
    dataset.check_block_size(block_size)


def carried_text(init_from, dataset, checkpoint=None):
    """What a run's checkpoints carry of the model's own text beside their data set's -> ({name:
    content}, lines to note, whether the data's tokens are known to be the model's).

    Raises UserError naming the first of the data set's tokens that the model knows otherwise. A
    model without a tokenizer that can be read is a note: then the number of tokens has to do.
    """
    if init_from == "scratch":
        return {}, [], True
    if checkpoint is None and init_from in GPT2_SIZES and dataset.meta["tokenizer"] == "gpt2":
        return {}, [], True
    files = {}
    if checkpoint is not None:
        saved = checkpoint.get("dataset") or {}
        files = checkpoint.get("text_files") or saved.get("text_files") or {}
        if not files:
            return {}, [], False  # check_dataset holds what its data set said against this one
    try:
        text = text_of_files(files, "the checkpoint") if files else load_pretrained_text(init_from)
        tokens = dataset.tokenizer()
    except UserError as error:
        return files, [f"the data's tokens are taken to be the model's, unseen: {error}"], False
    if difference := other_meaning(tokens, text.tokenizer):
        raise UserError(
            f"the data set {dataset.name} was not made with the tokenizer of {init_from}: "
            f"{difference}; make it so by data/prepare_text.py --tokenizer={init_from}"
        )
    known = text.files == dataset.meta.get("text_files")
    return {} if known else text.files, text.notes, True


def continue_optimizer(settings, model, optimizer, scaler, checkpoint):
    """Load the states of optimizer and scaler if they are those that were saved -> what to note.

    A list of lines: empty, or why the optimizer's state starts fresh.
    """
    saved = checkpoint.get("config") or {}
    before = f"{saved.get('optimizer_variant', 'adam')} {saved.get('optimizer_options', '')}"
    now = f"{settings.optimizer_variant} {settings.optimizer_options}"
    reason = f"it was saved by {before.strip()}, this run uses {now.strip()}"
    if now == before:
        shapes = {name: tensor.shape for name, tensor in checkpoint["model"].items()}
        reason = load_optimizer(optimizer, model, checkpoint.get("optimizer"), shapes)
    if scaler.is_enabled() and checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
    return [f"optimizer state starts fresh: {reason}"] if reason else []
