"""Train a GPT: `python train.py config/train_shakespeare_char.py --optimizer_variant=adamsn`.

One process, or several through `torchrun --standalone --nproc_per_node=2 train.py ...`: the
iteration's batch is then shared out, so the run is the same but for rounding. An interrupted run
(Ctrl-C, SIGTERM, SIGKILL, a power cut) continues with `--init_from=resume`, on the CPU bitwise as
if nothing had happened: model, optimizer and loop state come from the last checkpoint, and every
random choice is a function of (seed, iteration). Exit status: 0 done, 1 stopped by what happened
(loss not finite, out of memory), 2 wrong input, 130 or 143 stopped by a signal after saving.
"""

import math
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    BEST,
    LAST,
    checkpoint_to_resume,
    copy_checkpoint,
    load_checkpoint,
    load_optimizer,
    model_args,
    save_checkpoint,
)
from configurator import config_dict, parse_config, save_config
from dataset import load_dataset
from errors import UserError
from evaluation import evaluate
from memory import is_out_of_memory
from one_pass import one_pass
from optimizer_setup import check_param_dtype, lr_factor, make_optimizer
from optimizers import VARIANTS
from processor import keep_freed_memory
from runtime import (
    DATA_STREAM,
    StopSignal,
    iteration_seed,
    run_script,
    setup_runtime,
)
from starting_point import adopt_model_args, build_model, check_dataset, resumed_settings
from training_log import (
    StepClock,
    TrainingLog,
    advise_oom,
    startup_summary,
    updates_inside_backward,
)


@dataclass
class Settings:
    # run
    out_dir: str = "out"  # where checkpoints, metrics.csv and config.json go
    init_from: str = "scratch"  # scratch | resume | gpt2* | a hub id or folder of a model
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
    n_kv_head: int | None = None  # key/value heads; None: n_head, or n_head/4 for `grouped`
    attention_policy: str = "cache"  # cache | grouped | recompute
    q_chunk: int | None = None  # rows a tile; None: chosen by the policy
    k_chunk: int | None = None  # key/value rows a tile; None: chosen by the policy
    checkpoint_layers: bool = False  # keep each layer's input only, compute the rest again
    offload: bool = False  # keep those inputs in pinned host memory (CUDA)
    int4: bool = False  # for sample.py; training refuses it
    # optimizer
    optimizer_variant: str = field(default="adam", metadata={"help": " | ".join(VARIANTS)})
    optimizer_options: str = ""  # the variant's own, as in "partition=row,norm=mean"
    learning_rate: float | None = None  # of linear weights; None: the variant's own
    embedding_lr: float | None = None  # of everything else; None: the variant's own
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

    def __post_init__(self):
        for name in ("log_interval", "gradient_accumulation_steps", "batch_size", "block_size"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("seed", "max_iters", "eval_interval", "eval_iters", "warmup_iters",
                     "grad_clip", "min_lr", "weight_decay"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name} must not be negative, but is {getattr(self, name)}")
        if self.lr_schedule not in ("cosine", "linear"):
            raise UserError(f"unknown lr_schedule {self.lr_schedule!r}; use cosine or linear")
        check_param_dtype(self)
        if self.int4:
            raise UserError("int4=True packs weights for use, not for training: train without it, "
                            "then sample.py --int4=True")


class TrainingStopped(RuntimeError):
    """The run cannot go on, for a reason that is not the user's input. Exit status 1."""


def main(argv=None, make_optimizer=make_optimizer):
    """make_optimizer(settings, model, runtime): another one, for optimizers that are not ours."""
    settings, given = parse_config(Settings, argv)
    checkpoint = None
    if settings.init_from == "resume":
        checkpoint = load_checkpoint(checkpoint_to_resume(settings.out_dir))
        settings = resumed_settings(settings, given, checkpoint)
    dtype = settings.dtype if settings.param_dtype == "float32" else settings.param_dtype
    runtime = setup_runtime(settings.device, dtype, settings.seed, settings.backend)
    if runtime.device_type == "cpu":
        keep_freed_memory()
    trainer = None
    try:
        trainer = Trainer(settings, given, runtime, checkpoint, make_optimizer)
        checkpoint = None  # its memory is the run's from here on
        trainer.run()
    except TrainingStopped as reason:
        if runtime.is_main:  # every process meets it
            print(f"error: {reason}", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {advise_oom(settings, trainer)}", file=sys.stderr)
        sys.exit(1)
    finally:
        trainer = None
        runtime.close()


class Trainer:
    """One run: what it needs, its loop, what it reports and saves."""

    def __init__(self, settings, given, runtime, checkpoint=None, make_optimizer=make_optimizer):
        """Build data set, model and optimizer. Raises UserError; writes nothing."""
        if settings.gradient_accumulation_steps % runtime.world_size:
            raise UserError(f"gradient_accumulation_steps={settings.gradient_accumulation_steps} "
                            f"must be a multiple of the {runtime.world_size} processes")
        self.runtime = runtime
        self.dataset = load_dataset(settings.dataset, settings.data_dir)
        self.raw_model = build_model(settings, given, self.dataset, checkpoint)
        self.settings = settings = adopt_model_args(settings, given, self.raw_model)
        check_dataset(self.dataset, self.raw_model, checkpoint)
        self.one_pass = one_pass(settings, self.dataset)
        self.raw_model.to(runtime.device).train()
        self.optimizer = make_optimizer(settings, self.raw_model, runtime)
        self.scaler = torch.amp.GradScaler(
            runtime.device_type, enabled=runtime.dtype == torch.float16)
        self.iteration, self.best_val_loss, seconds = 0, math.inf, 0.0
        self.notices = []
        if checkpoint is not None:
            self.iteration, self.best_val_loss = checkpoint["iter_num"], checkpoint["best_val_loss"]
            seconds = checkpoint.get("train_seconds", 0.0)
            self._continue_optimizer(checkpoint)
        self.compiled = runtime.device_type == "cuda" if settings.compile is None \
            else settings.compile
        self.model = self.raw_model
        if self.compiled:
            self.model = self.raw_model.compiled(settings.block_size, runtime.device_type)
        self.parallel = self.model  # what a training step calls
        if runtime.world_size > 1:
            self.parallel = DistributedDataParallel(self.model)
        self.clock = StepClock(runtime, seconds)
        self.out_dir = Path(settings.out_dir)
        self.tokens_per_iteration = (settings.gradient_accumulation_steps * settings.batch_size
                                     * settings.block_size)
        self.agreed_to_stop = False
        self.losses = []  # of the iterations since they were last read, still on the device
        self.losses_from = 0  # the first of those iterations
        self.norm = None  # of the last gradients, before clipping
        self.eval_seconds = 0.0

    def _continue_optimizer(self, checkpoint):
        """Load optimizer and scaler state if the optimizer is the one that was saved."""
        saved = checkpoint.get("config", {})
        before = f"{saved.get('optimizer_variant', 'adam')} {saved.get('optimizer_options', '')}"
        now = f"{self.settings.optimizer_variant} {self.settings.optimizer_options}"
        reason = f"it was saved by {before.strip()}, this run uses {now.strip()}"
        if now == before:
            reason = load_optimizer(self.optimizer, self.raw_model, checkpoint.get("optimizer"))
        if reason:
            self.notices.append(f"optimizer state starts fresh: {reason}")
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])

    # ------------------------------------------------------------------ the loop

    def run(self):
        """Train to max_iters, or only evaluate. A signal ends the process with 128 + its number."""
        with StopSignal() as self.stop_signal:
            if self.settings.eval_only:
                return self._evaluate_only()
            self._open_out_dir()
            try:
                self._train()
            finally:
                self.log.close()  # whatever the end: no bar in its way, no file or tracker open

    def _evaluate_only(self):
        log = TrainingLog(self.runtime)
        log.say(startup_summary(self))
        if (losses := evaluate(self)) is None:
            sys.exit(128 + self.stop_signal.received)
        log.say(f"step {self.iteration}: train loss {losses['train']:.4f}, "
                f"val loss {losses['val']:.4f}")

    def _train(self):
        settings, interval = self.settings, self.settings.eval_interval
        self.clock.start()
        while self.iteration < settings.max_iters and not self.stopping():
            if interval and self.iteration % interval == 0 and not self.evaluate_and_save():
                break
            self.set_learning_rate()
            if not self.losses:
                self.losses_from = self.iteration
            self.losses.append(self.step())
            if self.iteration % settings.log_interval == 0:
                self.report()
            self.iteration += 1
            self.log.advance()
        if not self.stopping():
            self.evaluate_and_save()
        if self.stopping():
            self._save_and_exit()
        best = f"best val loss {self.best_val_loss:.4f}, in {self.out_dir / BEST}"
        self.log.close(f"done: {self.iteration} iterations, {self.clock.total:.1f} s of training; "
                       + (best if math.isfinite(self.best_val_loss) else "nothing to keep"))

    def step(self):
        """One iteration: gradients of its whole batch, clipped, and an update -> its loss."""
        settings, runtime = self.settings, self.runtime
        runtime.seed(iteration_seed(settings.seed, self.iteration, 1 + runtime.rank))
        count = settings.gradient_accumulation_steps // runtime.world_size
        total = 0.0
        for index, (x, y) in enumerate(self.micro_batches()):
            if runtime.world_size > 1:  # gradients are averaged once, after the last one
                self.parallel.require_backward_grad_sync = index == count - 1
            with runtime.autocast():
                loss = self.parallel(x, y)[1] / count
            self.scaler.scale(loss).backward()
            total = total + loss.detach()
        inside = updates_inside_backward(self.optimizer)  # there gradients are gone by now
        if settings.grad_clip > 0 and not inside:
            self.scaler.unscale_(self.optimizer)
            self.norm = torch.nn.utils.clip_grad_norm_(
                self.raw_model.parameters(), settings.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if inside:
            self.norm = self.optimizer.fused.norm
        return total

    def micro_batches(self):
        """This process's share of the iteration's batch: pairs of x, y (B, T) int64.

        Every process draws all of it, in order, from a generator seeded for the iteration, and
        keeps each world_size-th: neither a resume nor the number of processes changes the data.
        """
        settings, runtime = self.settings, self.runtime
        generator = torch.Generator().manual_seed(
            iteration_seed(settings.seed, self.iteration, DATA_STREAM))
        for index in range(settings.gradient_accumulation_steps):
            mine = index % runtime.world_size == runtime.rank
            device = runtime.device if mine else "cpu"
            if self.one_pass:
                batch = self.one_pass.batch(self.iteration, index, device)
            else:
                batch = self.dataset.batch("train", settings.batch_size, settings.block_size,
                                           generator, device)
            if mine:
                yield batch

    def set_learning_rate(self):
        """Every group's `lr` for this iteration: its `initial_lr` times the schedule's factor."""
        factor = lr_factor(self.iteration, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def learning_rate(self):
        """The present rate of linear weights: the one `learning_rate` sets."""
        groups = self.optimizer.param_groups
        linear = [g for g in groups if g["name"] not in ("embedding", "vector")]
        return (linear or groups)[0]["lr"]

    def stopping(self):
        """Has a signal asked to end? Several processes must agree, which they do in read_losses."""
        if self.runtime.world_size > 1:
            return self.agreed_to_stop
        return self.stop_signal.received is not None

    # ------------------------------------------------------------------ evaluation and saving

    def evaluate_and_save(self):
        """Evaluate, report, keep the best and the last checkpoint. False if a signal came first."""
        self.clock.stop()
        self.read_losses()
        began = time.perf_counter()
        if (losses := evaluate(self)) is None:
            return False
        if not math.isfinite(losses["val"]):
            raise self._not_finite("the validation loss", self.iteration)
        better = self.iteration > 0 and losses["val"] < self.best_val_loss
        if better:
            self.best_val_loss = losses["val"]
        self.eval_seconds = time.perf_counter() - began
        self.log.evaluation(self.eval_seconds, better, **self._progress(),
                            train_loss=losses["train"], val_loss=losses["val"])
        if better or (self.iteration > 0 and self.settings.always_save_checkpoint):
            self.save(BEST, LAST)
        elif self.iteration != self.saved_iteration:
            self.save(LAST)
        self.clock.start()
        return True

    def save(self, *names):
        """Write the present state to out_dir/name for each name, in that order.

        The best comes before the last: killed between the two, the run goes on from the older
        last one, meets the same best again and writes it again.
        """
        if not all(bool(p.isfinite().all()) for p in self.raw_model.parameters()):
            raise self._not_finite("a weight", self.iteration)
        self.saved_iteration = self.iteration
        if not self.runtime.is_main:
            return
        self.log.metrics.sync()
        first, *others = [self.out_dir / name for name in names]
        save_checkpoint(first, {
            "model": self.raw_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "model_args": model_args(self.raw_model),
            "iter_num": self.iteration,
            "best_val_loss": self.best_val_loss,
            "train_seconds": self.clock.total,
            "config": config_dict(self.settings),
            "dataset": {"name": self.dataset.name, **self.dataset.meta},
        })
        for other in others:
            copy_checkpoint(first, other)

    def _open_out_dir(self):
        """Make out_dir, its log and config.json; a fresh run's state 0 replaces an older run's."""
        self.log = TrainingLog(self.runtime, self.settings, self.iteration)
        self.log.say(startup_summary(self))
        if self.runtime.is_main:
            save_config(self.settings, self.out_dir / "config.json")
        self.saved_iteration = self.iteration
        if self.iteration == 0:
            self.save(LAST)
        self.reported = self.iteration, self.clock.total

    def _save_and_exit(self):
        """A signal asked for the end: save, say so, leave with the shell's status for it."""
        self.clock.stop()
        self.read_losses()
        self.save(LAST)
        number = self.stop_signal.received or signal.SIGTERM
        self.log.close(f"stopped by {signal.Signals(number).name} before iteration "
                       f"{self.iteration}; {self.out_dir / LAST} is saved, continue with "
                       "--init_from=resume")
        sys.exit(128 + number)

    # ------------------------------------------------------------------ reporting

    def read_losses(self):
        """Losses since the last call, of all processes together -> list of floats.

        The one place that waits for the device between evaluations. Raises TrainingStopped on a
        loss that is not finite; the processes agree here on whether a signal asks to stop.
        """
        losses = torch.stack(self.losses).tolist() if self.losses else []
        self.losses.clear()
        signalled = float(self.stop_signal.received is not None)
        *losses, signalled = self.runtime.mean([*losses, signalled])
        self.agreed_to_stop = signalled > 0
        for iteration, loss in enumerate(losses, self.losses_from):
            if not math.isfinite(loss):
                raise self._not_finite("the loss", iteration)
        return losses

    def _not_finite(self, what, iteration):
        return TrainingStopped(
            f"{what} is not finite at iteration {iteration}; the last good checkpoint is "
            f"{self.out_dir / LAST} (iteration {self.saved_iteration}): try a lower learning_rate "
            "or a longer warmup_iters")

    def report(self):
        """The log line and metrics row of this iteration; times are means since the last one."""
        settings = self.settings
        loss = self.read_losses()[-1]
        seconds = self.clock.read()
        iteration_then, seconds_then = self.reported
        self.reported = self.iteration + 1, seconds
        each = (seconds - seconds_then) / (self.iteration + 1 - iteration_then)
        remaining = settings.max_iters - self.iteration - 1
        interval = settings.eval_interval or settings.max_iters
        evaluations = settings.max_iters // interval - self.iteration // interval
        peak, peak_of = self.runtime.peak_memory()
        self.log.iteration(
            remaining * each + evaluations * self.eval_seconds, peak_of, **self._progress(),
            loss=loss, lr=self.learning_rate(),
            grad_norm=None if self.norm is None else self.norm.item(),
            tokens_per_s=self.tokens_per_iteration / each, ms=1000 * each, peak_mb=peak / 1e6)

    def _progress(self):
        """Cells of metrics.csv that every row has."""
        return {"iter": self.iteration, "tokens": self.iteration * self.tokens_per_iteration,
                "seconds": round(self.clock.total, 6)}


if __name__ == "__main__":
    run_script(main)
