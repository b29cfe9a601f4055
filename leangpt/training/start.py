"""What a training run goes on from, and which settings the command line still owns then.

Shapes come with the weights, everything else may be changed. A resumed run takes over the settings
it was saved with; only what this command gives is changed.
"""

from dataclasses import asdict, fields, replace

from leangpt.optim.resume import load_optimizer
from leangpt.system.errors import UserError
from leangpt.system.reading import check_fields

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


def adopt_model_args(settings, given, model):
    """`settings` with the shapes `model` really has -> a new settings object.

    block_size remains where it is less than the context of a model with relative positions, and was
    given, now or by the run that is resumed. Raises UserError where this command gave a shape that
    the weights do not have.
    """
    args = {name: value for name, value in asdict(model.config).items() if hasattr(settings, name)}
    given_once = "block_size" in given or settings.init_from == "resume"
    if model.config.position != "learned" and given_once:
        if settings.block_size <= model.config.block_size:
            args.pop("block_size")
    if settings.init_from != "scratch":
        for name in sorted(set(given) & set(args)):
            wanted = getattr(settings, name)
            if wanted != args[name]:
                raise UserError(
                    f"{name}={wanted!r} contradicts the weights of init_from="
                    f"{settings.init_from!r}, which have {name}={args[name]!r}; leave it out"
                )
    return replace(settings, **args)


def check_dataset(dataset, model, block_size, checkpoint=None):
    """Raise UserError where the data set cannot train the model: other tokens, or too few."""
    saved = (checkpoint or {}).get("dataset") or {}
    for key in ("tokenizer", "characters"):
        if key in saved and saved[key] != dataset.meta.get(key):
            raise UserError(
                f"the data set {dataset.name} has another vocabulary than "
                f"{saved.get('name', 'the one')}, which the checkpoint was trained on"
            )
    have, need = model.config.vocab_size, dataset.vocab_size
    if not need <= have < need + 1024:  # a model's table may be padded
        raise UserError(
            f"the data set has {need} different tokens, the model {have}: they do not "
            "share a tokenizer; prepare the data with the model's"
        )
    dataset.check_block_size(block_size)


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
