"""What a training run says: console lines, metrics.csv, a progress bar, optional trackers.

Lines are plain text, one a report, so that `grep ^iter log.txt` works; the bar is drawn on a
terminal only. Each row of metrics.csv is flushed when written, and a resumed run first drops the
rows its checkpoint does not know of, so the file reads as if nothing had been interrupted.
"""

import csv
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from configurator import describe_changes
from leangpt.memory import plan
from leangpt.memory.meter import tensor_bytes
from leangpt.optim import optimizer_table, planned_bytes, updates_inside_backward
from leangpt.system.errors import UserError
from leangpt.text.dataset import describe

# One row an iteration logged (loss: that iteration's batch, before its update), one an evaluation
# (train_loss, val_loss); a cell that does not apply is empty. peak_mb: Runtime.peak_memory.
# seconds: spent training so far, without evaluations and saves.
COLUMNS = (
    "iter",
    "tokens",
    "loss",
    "train_loss",
    "val_loss",
    "lr",
    "grad_norm",
    "tokens_per_s",
    "ms",
    "peak_mb",
    "seconds",
)


class StepClock:
    """Seconds spent training, with the device's work included; stopped for everything else."""

    def __init__(self, runtime, seconds=0.0):
        self.runtime, self.total, self.since = runtime, seconds, None

    def start(self):
        self.runtime.synchronize()
        self.since = time.perf_counter()

    def read(self):
        """Seconds so far; waits for the device."""
        self.runtime.synchronize()
        now = time.perf_counter()
        if self.since is not None:
            self.total += now - self.since
            self.since = now
        return self.total

    def stop(self):
        self.read()
        self.since = None


class MetricsFile:
    """metrics.csv: a header and rows of COLUMNS, each on the disk's queue as soon as written."""

    def __init__(self, path, first_iteration=0):
        """Start anew, or keep what came before `first_iteration` if that is not 0."""
        kept = _rows_before(path, first_iteration) if first_iteration else []
        temporary = Path(f"{path}.tmp")
        with open(temporary, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *kept])
        os.replace(temporary, path)
        self.file = open(path, "a", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS, lineterminator="\n")

    def write(self, **cells):
        try:
            self.writer.writerow(cells)
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.file.name}: {error.strerror}") from error

    def sync(self):
        """Before a checkpoint: its rows must not be lost where the checkpoint is not."""
        os.fsync(self.file.fileno())


def _rows_before(path, iteration):
    """Whole rows of an earlier metrics.csv whose iteration is below `iteration`."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        lines = [line for line in file if line.endswith("\n")]  # a kill can cut the last one
    rows = [row for row in csv.reader(lines) if len(row) == len(COLUMNS)]
    return [row for row in rows if row[0].isdigit() and int(row[0]) < iteration]


class TrainingLog:
    """Everything a run reports. Only the main process of several has one that does anything."""

    def __init__(self, runtime, settings=None, first_iteration=0):
        """Makes out_dir and opens its metrics.csv; without settings, it only speaks.

        Raises UserError for a tracker that is not installed and an out_dir that cannot be written.
        """
        self.enabled = runtime.is_main
        self.bar = self.wandb = self.board = self.metrics = None
        if not self.enabled or settings is None:
            return
        self.wandb = _start_wandb(settings) if settings.wandb_log else None
        self.board = _start_tensorboard(settings) if settings.tensorboard_log else None
        try:
            Path(settings.out_dir).mkdir(parents=True, exist_ok=True)
            self.metrics = MetricsFile(Path(settings.out_dir) / "metrics.csv", first_iteration)
        except OSError as error:
            raise UserError(
                f"cannot write to out_dir={settings.out_dir!r}: {error.strerror}"
            ) from None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=settings.max_iters,
                initial=first_iteration,
                unit="it",
                dynamic_ncols=True,
                leave=False,
            )

    def say(self, text):
        """Print a line, above the bar if there is one."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def advance(self):
        """One more iteration is done."""
        if self.bar is not None:
            self.bar.update()

    def iteration(self, eta_seconds, peak_of, **cells):
        """A line and a row on one iteration. cells: COLUMNS."""
        if self.metrics is None:
            return
        norm = cells["grad_norm"]
        self.say(
            f"iter {cells['iter']}: loss {cells['loss']:.4f}, lr {cells['lr']:.3e}, "
            + (f"norm {norm:.3f}, " if norm is not None else "")
            + f"{cells['tokens_per_s']:.0f} tok/s, {cells['ms']:.1f} ms, "
            f"peak {cells['peak_mb']:.0f} MB ({peak_of}), eta {clock_time(eta_seconds)}"
        )
        self._record(cells)

    def evaluation(self, took, is_best, **cells):
        """A line and a row on one evaluation, which took so many seconds. cells: COLUMNS."""
        if self.metrics is None:
            return
        best = " (best)" if is_best else ""
        self.say(
            f"step {cells['iter']}: train loss {cells['train_loss']:.4f}, "
            f"val loss {cells['val_loss']:.4f}{best}, evaluated in {took:.1f} s"
        )
        self._record(cells)

    def _record(self, cells):
        self.metrics.write(**cells)
        numbers = {
            name: value for name, value in cells.items() if value is not None and name != "iter"
        }
        if self.wandb is not None:
            self.wandb.log(numbers, step=cells["iter"])
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, cells["iter"])

    def close(self, last_words=None):
        """Take the bar away, say one more line if there is one, close what is still open."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if last_words:
            self.say(last_words)
        if self.metrics is not None:
            self.metrics.file.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.board is not None:
            self.board.close()
        self.metrics = self.wandb = self.board = None


def startup_summary(trainer):
    """What a Trainer is about to run, as lines of text."""
    settings, model, runtime = trainer.settings, trainer.raw_model, trainer.runtime
    parameters = list(model.parameters())
    state = optimizer_bytes(trainer.optimizer)
    weights = tensor_bytes(parameters)
    fused = updates_inside_backward(trainer.optimizer)
    gradients = "freed one by one" if fused else megabytes(weights)
    table = optimizer_table(model, trainer.optimizer)
    compiled = ", compiled (the first step takes a while)" if trainer.compiled else ""
    lines = {
        "device": runtime.describe() + compiled,
        "data": describe(trainer.dataset),
        "model": f"{model.num_params(non_embedding=False):,} parameters: {settings.n_layer} "
        f"layers, {settings.n_head} heads ({model.config.kv_heads} for keys and "
        f"values), {settings.n_embd} wide, block {settings.block_size}",
        "attention": f"{settings.attention_policy}, q_chunk {settings.q_chunk}, "
        f"k_chunk {settings.k_chunk}",
        "memory": f"parameters {megabytes(weights)}, gradients {gradients}, "
        f"optimizer state {megabytes(state)} ({settings.optimizer_variant})",
        "optimizer": table.replace("\n", "\n" + " " * 11),
        "batch": f"{trainer.tokens_per_iteration:,} tokens per iteration: "
        f"{settings.gradient_accumulation_steps} x {settings.batch_size} sequences "
        f"of {settings.block_size}",
        "changed": describe_changes(settings),
    }
    if trainer.iteration:
        lines["resuming"] = f"from iteration {trainer.iteration} of {settings.out_dir}"
    text = [f"{name:<10} {line}" for name, line in lines.items()]
    return "\n".join(text + [f"note: {notice}" for notice in trainer.notices])


def optimizer_bytes(optimizer):
    """Bytes of state the optimizer has, or will have after its first step."""
    return sum(
        planned_bytes(optimizer, p, group)
        for group in optimizer.param_groups
        for p in group["params"]
    )


def advise_oom(settings, trainer=None):
    """One line: what did not fit, and what would: by memory_plan's formulas where the GPU's free
    memory and the model are known, else the settings that lower it and are not used yet."""
    if trainer is not None and trainer.runtime.device_type == "cuda":
        model, device = trainer.raw_model, trainer.runtime.device
        # what others left free, and what this process holds already, its allocator's cache included
        room = (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - tensor_bytes(model)
            - optimizer_bytes(trainer.optimizer)
        )
        element_size = 4 if trainer.runtime.dtype == torch.float32 else 2
        return (
            "out of memory: "
            + plan.advise_oom(
                model.config,
                settings.batch_size,
                settings.block_size,
                room,
                element_size,
                "cuda",
                gradient_size=next(model.parameters()).element_size(),
                fused_backward=updates_inside_backward(trainer.optimizer),
            )
            + low_byte_advice(settings)
        )
    advice = []
    if settings.attention_policy != "recompute":
        advice.append("--attention_policy=recompute")
    if not settings.checkpoint_layers:
        advice.append("--checkpoint_layers=True")
    if settings.batch_size > 1:
        advice.append(
            f"--batch_size={settings.batch_size // 2} --gradient_accumulation_steps="
            f"{settings.gradient_accumulation_steps * 2}"
        )
    if settings.optimizer_variant == "adam":
        advice.append("--optimizer_variant=adamsn8")
    return (
        f"out of memory with attention_policy={settings.attention_policy!r} "
        f"(q_chunk={settings.q_chunk}, k_chunk={settings.k_chunk}) and {settings.batch_size} x "
        f"{settings.block_size} tokens a micro-batch; try "
        f"{' or '.join(advice) or 'a smaller model or a smaller q_chunk'}"
        + low_byte_advice(settings)
    )


def low_byte_advice(settings):
    """What shrinks weights, gradients and state, where they are not small already."""
    if settings.param_dtype != "float32" or settings.optimizer_options:
        return ""
    several = settings.gradient_accumulation_steps > 1
    return (
        "; weights, gradients and optimizer state shrink by --param_dtype=bfloat16 "
        "--optimizer_variant=muonsn8"
        + ("" if several else ", further by --optimizer_options=fused_backward=True")
    )


def clock_time(seconds):
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def megabytes(count):
    """Bytes as text in MB (10^6 bytes)."""
    return f"{count / 1e6:,.2f} MB"


def _start_wandb(settings):
    try:
        import wandb
    except ImportError:
        raise UserError(
            "wandb_log=True needs the package wandb: pip install wandb, or leave wandb_log out"
        ) from None
    try:
        return wandb.init(
            project=settings.wandb_project, name=settings.wandb_run_name, config=vars(settings)
        )
    except Exception as error:  # no account, no network: wandb has classes of its own for each
        raise UserError(f"wandb_log=True: wandb did not start ({error})") from None


def _start_tensorboard(settings):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "tensorboard_log=True needs the package tensorboard: pip install "
            "tensorboard, or leave tensorboard_log out"
        ) from None
    return SummaryWriter(Path(settings.out_dir) / "tensorboard")
