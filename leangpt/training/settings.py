"""All that a training run can be told: the settings of train.py, which plan.py takes too."""

from dataclasses import dataclass, field

from leangpt.optim import VARIANTS
from leangpt.system.errors import UserError
from leangpt.training.schedule import SCHEDULES

MOST = 2**31 - 1  # of anything that is counted: no product of two overflows
MOST_TOKENS = 2**27  # of a micro-batch: more than any memory takes


@dataclass
class Settings:
    """All that a run can be told; names and defaults are nanoGPT's where it has them."""

    # run
    out_dir: str = "out"  # where checkpoints, metrics.csv and config.json go
    overwrite: bool = False  # erase an earlier run in out_dir instead of moving it aside
    init_from: str = "scratch"  # scratch | resume | auto: either | gpt2* | a hub id or folder
    seed: int = 1337  # of the initial weights, the data order and dropout
    max_iters: int = 600000  # iterations in all
    eval_interval: int = 2000  # iterations between evaluations, each with a save; 0: at the end
    eval_iters: int = 0  # batches an evaluation samples; 0: the whole validation split
    eval_only: bool = False  # evaluate once and stop, writing nothing
    log_interval: int = 10  # iterations between log lines
    always_save_checkpoint: bool = False  # ckpt.pt at every evaluation, not only the best
    wandb_log: bool = False  # report to Weights & Biases (package wandb)
    wandb_project: str = "owt"  # its project
    wandb_run_name: str = "gpt2"  # its name for this run
    tensorboard_log: bool = False  # write out_dir/tensorboard (package tensorboard)
    # data
    dataset: str = "openwebtext"  # a folder of data/ that has been prepared
    data_dir: str = "data"  # the folder of data sets
    data_order: str = "random"  # random: windows anywhere | once: one pass over shuffled blocks
    gradient_accumulation_steps: int = 40  # micro-batches an iteration, over all processes
    batch_size: int = 12  # sequences a micro-batch
    block_size: int = 1024  # tokens a sequence
    # model
    n_layer: int = 12  # blocks
    n_head: int = 12  # query heads
    n_embd: int = 768  # width
    dropout: float = 0.0  # 0 for pretraining, 0.1 and more for finetuning
    attention_dropout: float | None = None  # on attention weights; None: as dropout
    bias: bool = False  # in linear and norm layers
    position: str = "learned"  # learned | rope | none
    n_kv_head: int | None = field(
        default=None,
        metadata={"alias": "kv_heads", "help": "key/value heads; None: n_head, or n_head/4"},
    )
    attention_policy: str = field(
        default="cache", metadata={"alias": "policy", "help": "cache | grouped | recompute | auto"}
    )
    q_chunk: int | None = None  # rows per tile; None: chosen by the policy
    k_chunk: int | None = None  # key/value rows per tile; None: chosen by the policy
    checkpoint_layers: bool = False  # keep each layer's input only, compute the rest again
    checkpoint_first: int | None = None  # of so many layers only, the first ones; None: of all
    offload: bool = False  # keep those inputs in pinned host memory (CUDA)
    memory: str | None = None  # plan the run for so much, as 24GB; ignore: start it, fit or not
    int4: bool = False  # for sample.py; training refuses it
    # optimizer
    optimizer_variant: str = field(default="adam", metadata={"help": " | ".join(VARIANTS)})
    optimizer_options: str = ""  # the variant's own, as in "partition=row,norm=mean"
    learning_rate: float | None = None  # of everything; None: the variant's, by the model's width
    embedding_lr: float | None = None  # of all but linear weights, where it differs
    weight_decay: float = 1e-1  # decoupled, on matrices
    beta1: float | None = None  # decay of momentum; None: the variant's own, mostly 0.9
    beta2: float | None = None  # decay of second moments; None: the variant's own, mostly 0.95
    grad_clip: float = 1.0  # largest norm of all gradients together; 0.0: no clipping
    decay_lr: bool = True  # warm up, then lr_schedule down to min_lr; False: constant
    lr_schedule: str = "cosine"  # cosine | linear
    warmup_iters: int = 2000  # iterations of warmup
    lr_decay_iters: int | None = None  # iteration that reaches min_lr; None: max_iters
    min_lr: float | None = None  # last learning rate; None: a tenth of learning_rate
    # machine
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"  # of products (autocast): auto | float32 | bfloat16 | float16
    param_dtype: str = "float32"  # of weights and gradients: float32 | bfloat16 (see README)
    compile: bool | None = None  # torch.compile; None: on CUDA only
    backend: str = "auto"  # of several processes: auto | nccl | gloo
    parallel: str = "auto"  # they hold: ddp: everything each | fsdp: a share | auto: ddp if it fits
    context_parallel: int = 1  # processes that share each sequence, a piece of its rows each

    def __post_init__(self):
        positive = {
            name: getattr(self, name)
            for name in (
                "log_interval",
                "gradient_accumulation_steps",
                "batch_size",
                "block_size",
                "context_parallel",
            )
        }
        for name, value in positive.items():
            if value <= 0:
                raise UserError(f"{name} must be positive, not {value}")
        for name in (
            "seed",
            "max_iters",
            "eval_interval",
            "eval_iters",
            "warmup_iters",
            "lr_decay_iters",
            "grad_clip",
            "min_lr",
            "weight_decay",
        ):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("learning_rate", "embedding_lr"):
            if (rate := getattr(self, name)) is not None and rate <= 0:
                raise UserError(f"{name} must be positive, not {rate}")
        for name in ("beta1", "beta2"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise UserError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        sizes = {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd")}
        for name, value in {**positive, **sizes}.items():
            if value > MOST:
                raise UserError(f"{name} must be at most {MOST:,}, not {value:,}")
        if (tokens := self.batch_size * self.block_size) > MOST_TOKENS:
            raise UserError(f"a micro-batch has at most {MOST_TOKENS:,} tokens, not {tokens:,}")
        if self.overwrite and self.init_from == "resume":
            raise UserError("overwrite=True erases what init_from=resume would go on from")
        if self.lr_schedule not in SCHEDULES:
            known = " or ".join(SCHEDULES)
            raise UserError(f"unknown lr_schedule {self.lr_schedule!r}; use {known}")
        check_param_dtype(self)
        if self.int4:
            raise UserError(
                "int4=True packs weights for use, not for training: train without it, "
                "then sample.py --int4=True"
            )


def check_param_dtype(settings):
    """Raise UserError where weights of `param_dtype` could not be trained as `settings` say.

    bfloat16 weights have 8 bits: most updates are smaller than the distance to the next number, so
    they only add up where they are rounded stochastically, as all optimizers here but torch's do.
    """
    if settings.param_dtype == "float32":
        return
    if settings.param_dtype != "bfloat16":
        raise UserError(f"unknown param_dtype {settings.param_dtype!r}; use float32 or bfloat16")
    if settings.dtype not in ("auto", "bfloat16"):
        raise UserError(
            f"param_dtype=bfloat16 computes in bfloat16: leave out dtype={settings.dtype}"
        )
    if settings.optimizer_variant == "adam":
        raise UserError(
            "param_dtype=bfloat16 needs an optimizer that rounds stochastically, which "
            "adam does not: use adamsn8, muonsn8 or another"
        )
