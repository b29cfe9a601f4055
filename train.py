"""Train a GPT: `python train.py config/train_shakespeare_char.py --optimizer_variant=adamsn`.

One process, or several through `torchrun --standalone --nproc_per_node=2 train.py ...`: the
iteration's batch is then shared out, so the run is the same but for rounding. An interrupted run
(Ctrl-C, SIGTERM, SIGKILL, a power cut) continues with `--init_from=resume`, on the CPU bitwise as
if nothing had happened: model, optimizer and loop state come from the last checkpoint, and every
random choice is a function of (seed, iteration). `--init_from=auto` does that where there is a
checkpoint and begins where there is none. A fresh run in the out_dir of another one moves that one
aside whole. Exit status: 0 done, 1 stopped by what happened (loss not finite, out of memory), 2
wrong input, 129, 130, 141 or 143 stopped by a signal (terminal gone, Ctrl-C, reader gone as with
`| head`, SIGTERM) after saving.
"""

import signal
import sys
import time
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from configurator import config_dict, describe_changes, parse_config, read_words
from leangpt.attention.tile_sizes import check_dropout
from leangpt.optim import GradientNotFinite, frees_gradients
from leangpt.parallel.engine import Parallel, check_codes, clip_gradients
from leangpt.parallel.failures import attempt, first_to_say, is_lost_process, launch
from leangpt.parallel.modes import parallel_mode
from leangpt.parallel.pieces import cut_sequences
from leangpt.runs.checkpoint import LAST, model_from_checkpoint
from leangpt.runs.folder import RunFolder
from leangpt.system.errors import is_out_of_memory, named_as_typed
from leangpt.system.processor import keep_freed_memory
from leangpt.system.runtime import (
    DTYPES,
    is_first_of_machine,
    is_main_process,
    iteration_seed,
    run_script,
    setup_runtime,
)
from leangpt.system.stopping import Agreement, StopSignal
from leangpt.text.dataset import Dataset, load_dataset
from leangpt.text.one_pass import one_pass
from leangpt.training.batches import iteration_batches, share_of
from leangpt.training.evaluation import evaluate
from leangpt.training.losses import Losses, NotFinite
from leangpt.training.out_of_memory import advise_oom
from leangpt.training.planning import Fitted, fit, run_config
from leangpt.training.record import RunRecord
from leangpt.training.schedule import set_rates
from leangpt.training.settings import Settings
from leangpt.training.start import (
    adopt_model_args,
    adopted_block_size,
    carried_text,
    check_dataset,
    check_offload,
    continue_optimizer,
    resumed_settings,
)
from leangpt.training.summary import startup_summary
from model import GPT, GPTConfig
from optimizers import lr_factor, parse_options, run_options, run_rates
from optimizers import make_optimizer as own_optimizer


def main(argv=None, make_optimizer=own_optimizer):
    """make_optimizer(settings, model, runtime): another one, for optimizers that are not ours."""
    settings, given = parse_config(Settings, argv)
    flags = {key for _, key, _ in read_words(Settings, argv) if key}
    trainer = checkpoint = None
    writes = is_main_process() and not settings.eval_only
    with named_as_typed(given.typed), RunFolder(settings.out_dir, writes) as folder:
        if settings.init_from == "auto" or attempt() and launch() == folder.launch:
            settings.init_from = "resume" if folder.resumable else "scratch"
        if settings.init_from == "resume":
            checkpoint = folder.resume()
            settings = resumed_settings(settings, given, checkpoint)
        dtype = settings.dtype if settings.param_dtype == "float32" else settings.param_dtype
        machine = (settings.device, dtype, settings.seed, settings.backend)
        runtime = setup_runtime(*machine, settings.context_parallel)
        if runtime.device_type == "cpu":
            keep_freed_memory()
        try:
            trainer = Trainer(settings, given, runtime, checkpoint, make_optimizer, flags)
            checkpoint = None  # its memory is the run's from here on
            trainer.run(folder)
        except (NotFinite, GradientNotFinite) as reason:
            if runtime.is_main:  # every process meets it
                print(
                    f"error: {reason}; the last good checkpoint is {folder.path / LAST} "
                    f"(iteration {trainer.record.saved_iteration}): try a lower learning_rate or a "
                    "longer warmup_iters",
                    file=sys.stderr,
                )
            sys.exit(1)
        except (RuntimeError, MemoryError) as error:
            if is_lost_process(error):
                runtime.abandon()
                if first_to_say("lost"):
                    print(
                        "error: another process of this run ended; go on from "
                        f"{folder.path / LAST} with --init_from=resume",
                        file=sys.stderr,
                    )
                sys.exit(1)
            if not is_out_of_memory(error):
                raise
            built = ()
            if trainer:
                settings = trainer.settings
                options = parse_options(settings.optimizer_options)
                built = (trainer.fitted, trainer.raw_model.config, flags, options)
            print(f"error: {advise_oom(settings, runtime, *built)}", file=sys.stderr)
            sys.exit(1)
        finally:
            trainer = None
            runtime.close()


def fit_run(settings, given, flags, dataset, runtime, checkpoint):
    """Settings that fit the memory at hand -> Fitted. Raises UserError where these do not."""
    if settings.init_from == "scratch":
        dataset.check_block_size(settings.block_size)
    auto = settings.attention_policy == "auto"
    if auto:
        settings, flags = replace(settings, attention_policy="cache"), flags - {"attention_policy"}
    config = run_config(GPTConfig, settings, given, dataset.vocab_size, checkpoint)
    settings = replace(settings, block_size=adopted_block_size(settings, given, config))
    options = run_options(settings)
    return fit(settings, flags, config, options, runtime, auto)


def build_model(settings, given, dataset, checkpoint=None):
    """The model a run starts with, on the CPU, its weights of `param_dtype` -> GPT.

    Weights are drawn in float32 and rounded last, so one seed starts every dtype alike; those that
    are read go to their places one by one, and no float32 copy of them all is made.
    Raises UserError where the settings contradict the weights they start from.
    """
    free = {name: getattr(settings, name) for name in GPTConfig.FREE}
    if settings.init_from == "scratch":
        dataset.check_block_size(settings.block_size)  # before anything of that size is allocated
        model = GPT(run_config(GPTConfig, settings, given, dataset.vocab_size))
    elif settings.init_from == "resume":
        model = model_from_checkpoint(GPT, checkpoint, **free)
    else:
        model = GPT.from_pretrained(settings.init_from, dtype=DTYPES[settings.param_dtype], **free)
    if "block_size" in given:
        fit_context(model, settings.block_size)
    return model.to(DTYPES[settings.param_dtype])


def fit_context(model, block_size):
    """Make a model that was not made for this run take sequences of block_size tokens.

    A table of learned positions is cropped. Relative positions reach as far as they are asked to,
    and a model that trains on less than its context keeps it. Raises UserError past a window.
    """
    learned, more = model.config.position == "learned", block_size - model.config.block_size
    if learned and more < 0:
        model.crop_block_size(block_size)
    elif not learned and more > 0:
        model.config.block_size = replace(model.config, block_size=block_size).block_size


def await_checksums(dataset, log, stop):
    """At the end of a run, large token files have been held against their checksums: what was read
    is what was prepared. Raises UserError where it is not."""
    if dataset.checked():
        return
    log.say("reading the rest of the data, to hold it against its checksums")
    while not dataset.checked(seconds=0.2):
        if stop.received is not None:
            log.say("note: the data is not held against its checksums to the end")
            return


@dataclass
class Start:
    """What a run starts with: settings that fit, their data, a model on the CPU."""

    settings: Settings
    fitted: Fitted
    dataset: Dataset
    model: GPT
    text_files: dict  # of the model's text, for checkpoints
    notices: list[str]


def prepare(settings, given, flags, runtime, checkpoint=None) -> Start:
    """Open the data and build the model. Raises UserError; writes nothing.

    flags: names that the command line sets; None: start the run whether it fits or not.
    """
    check_offload(settings, runtime)
    dataset = load_dataset(settings.dataset, settings.data_dir, is_first_of_machine())
    fitted = Fitted(settings)
    if flags is not None:
        fitted = fit_run(settings, given, flags, dataset, runtime, checkpoint)
    share_of(fitted.settings, runtime.data_rank, runtime.data_parallel)  # can it be shared out?
    model = build_model(fitted.settings, given, dataset, checkpoint)
    settings = adopt_model_args(fitted.settings, given, model)
    if not settings.eval_only:
        in_pieces = settings.context_parallel > 1
        check_dropout(model.config, settings.block_size, runtime.device_type, in_pieces)
    files, notices, same_tokens = carried_text(settings.init_from, dataset, checkpoint)
    check_dataset(dataset, model, settings.block_size, checkpoint, same_tokens)
    return Start(settings, fitted, dataset, model, files, notices)


class Trainer:
    """One run: what it needs, and its loop."""

    def __init__(
        self, settings, given, runtime, checkpoint=None, make_optimizer=own_optimizer, flags=None
    ):
        """Data, model and optimizer, wherever they belong. Raises UserError; writes nothing.

        flags: as of `prepare`; a plan knows our own optimizers alone.
        """
        flags = flags if make_optimizer is own_optimizer else None
        start = prepare(settings, given, flags, runtime, checkpoint)
        self.runtime, self.settings, self.dataset = runtime, start.settings, start.dataset
        self.raw_model, settings = start.model, start.settings
        self.share = share_of(settings, runtime.data_rank, runtime.data_parallel)
        self.one_pass = one_pass(settings, self.dataset)
        mode = parallel_mode(settings, self.raw_model, make_optimizer, runtime)
        self.fitted = start.fitted
        self.parallel = Parallel(mode, runtime)
        blocks = self.raw_model.transformer.h
        if settings.context_parallel > 1:
            cut_sequences(self.raw_model, blocks, settings.context_parallel)
        self.parallel.shard(self.raw_model, blocks)  # one by one to the device
        self.raw_model.to(runtime.device).train()
        self.optimizer = make_optimizer(settings, self.raw_model, runtime)
        check_codes(self.optimizer)
        self.rates = run_rates(settings, self.raw_model)
        half = runtime.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(runtime.device_type, enabled=half)
        learned = (self.raw_model, self.optimizer, self.scaler)
        self.iteration = checkpoint["iter_num"] if checkpoint else 0
        self.notices = start.notices
        if checkpoint:
            self.notices = start.notices + continue_optimizer(settings, *learned, checkpoint)
        if settings.decay_lr and (settings.min_lr or 0) > self.rates.linear:
            self.notices.append("min_lr is above the learning rate: the rate rises to it")
        runtime.check_alike("the iteration to start from", self.iteration)
        on_gpu = runtime.device_type == "cuda"
        self.compiled = on_gpu if settings.compile is None else settings.compile
        self.model = self.raw_model
        if self.compiled:
            self.model = self.parallel.compiled(self.raw_model, settings.block_size)
        self.shared = self.parallel.wrap(self.model)  # its gradients are all processes'
        self.losses = Losses(runtime)
        self.norm = None  # of the last gradients, before clipping
        self.stop = StopSignal()
        self.stopping = Agreement(runtime, self.stop)
        files, saved = start.text_files, config_dict(settings)
        self.record = RunRecord(
            settings, saved, self.dataset, files, *learned, runtime, self.stop, checkpoint
        )

    def run(self, folder):
        """Train to max_iters in `folder`, or only evaluate. A signal ends the process with 128 +
        its number."""
        settings = self.settings
        with self.stop, closing(self.record):
            if not settings.eval_only:
                self.record.begin(folder)
            summary = startup_summary(
                settings, *(self.dataset, self.raw_model, self.optimizer, self.rates, self.runtime),
                parallel=self.parallel, fitted=self.fitted, compiled=self.compiled,
                iteration=self.iteration, changes=describe_changes(settings),
            )  # fmt: skip
            self.record.log.say("\n".join([summary, *(f"note: {n}" for n in self.notices)]))
            if not (self.evaluate() if settings.eval_only else self.train()):
                number = self.stop.received or signal.SIGTERM  # perhaps another process's
                self.losses.read()
                self.record.interrupt(self.iteration, signal.Signals(number).name)
                sys.exit(128 + number)
            await_checksums(self.dataset, self.record.log, self.stop)
            if not settings.eval_only:
                self.record.finish(self.iteration)
            self.record.log.raise_if_unheard()

    def train(self):
        """The loop -> True, or False where a signal ended it early."""
        settings, interval = self.settings, self.settings.eval_interval
        self.record.clock.start()
        while not self.stopping():
            over = self.iteration >= settings.max_iters
            if over or interval and self.iteration % interval == 0:
                if not self.evaluate():
                    return False
            if over:
                return True
            set_rates(self.optimizer, lr_factor(self.iteration, settings, self.rates.linear))
            loss = self.record.peak.of(self.step, self.norm)
            if loss is None:
                return False
            self.losses.add(self.iteration, loss)
            self.record.compare_peak(self.fitted)
            if self.iteration % settings.log_interval == 0:
                self.record.report(self.iteration, self.losses.read()[-1], self.norm)
            self.iteration += 1
            self.record.log.advance()
        return False

    def step(self, tick=lambda: None):
        """One iteration: gradients of its whole batch, clipped, and an update -> its loss, or None
        where a signal came before its last micro-batch: no weight has moved then, and a long
        iteration does not outlast what patience a scheduler has.

        tick: called before each micro-batch.
        """
        settings, runtime, scaler = self.settings, self.runtime, self.scaler
        runtime.seed(iteration_seed(settings.seed, self.iteration, 1 + runtime.rank))
        total = 0.0
        batches = iteration_batches(self.dataset, settings, runtime, self.iteration, self.one_pass)
        for index, (x, y, divisor) in enumerate(batches):
            if index and self.stopping():
                self.parallel.zero_gradients(self.optimizer)
                self.parallel.rest()
                return None
            tick()
            self.parallel.begin_micro_batch(last=index == self.share.count - 1)
            with runtime.autocast():
                loss = self.shared(x, y)[1] / divisor
            scaler.scale(loss).backward()
            total = total + loss.detach()
        freed = frees_gradients(self.optimizer)  # and clipped, as far as they can be
        if settings.grad_clip > 0 and not freed:
            scaler.unscale_(self.optimizer)
            self.norm = clip_gradients(self.raw_model.parameters(), settings.grad_clip)
        scaler.step(self.optimizer)
        scaler.update()
        self.parallel.zero_gradients(self.optimizer)
        if freed:
            self.norm = self.optimizer.strategy.norm
        return total

    def evaluate(self):
        """Losses of both splits, reported; then a checkpoint. False if a signal came first."""
        self.record.clock.stop()
        self.losses.read()
        began = time.perf_counter()
        losses = evaluate(
            self.raw_model,
            self.dataset,
            self.settings,
            self.runtime,
            self.stopping.again(),
            self.model if self.compiled else None,
            self.parallel.mode == "fsdp",
        )
        self.parallel.rest()
        if losses is not None:
            self.record.evaluation(self.iteration, losses, time.perf_counter() - began)
            self.record.clock.start()
        return losses is not None


if __name__ == "__main__":
    run_script(main)
