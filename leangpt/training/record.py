"""What a run says and leaves behind: its lines, metrics.csv, config.json, run.json, checkpoints."""

import math

from leangpt.optim import check_gradients
from leangpt.optim.sharded.rows import local
from leangpt.parallel.shards import has_shards
from leangpt.runs.checkpoint import BEST, LAST, save_run
from leangpt.runs.run import CONFIG, run_facts, write_facts, write_json
from leangpt.training.clock import StepClock
from leangpt.training.log import TrainingLog, remaining_seconds
from leangpt.training.losses import NotFinite
from leangpt.training.planning import measured_beside
from leangpt.training.schedule import linear_rate
from leangpt.training.step_peak import MEASURED, StepPeak
from leangpt.training.summary import optimizer_bytes


class RunRecord:
    """A run as others see it. Of several processes only the main one's speaks and writes.

    Before `begin` it only speaks: an evaluation alone leaves no file.
    """

    def __init__(
        self,
        settings,
        config,
        dataset,
        text_files,
        model,
        optimizer,
        scaler,
        runtime,
        stop,
        saved=None,
    ):
        """config: the settings as a dict. text_files: what checkpoints carry of the model's text.
        stop: the run's StopSignal. saved: the checkpoint that the run goes on from."""
        self.settings, self.config, self.dataset = settings, config, dataset
        self.text_files = text_files
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.runtime, self.fresh = runtime, saved is None
        saved = saved or {"iter_num": 0, "best_val_loss": math.inf}
        self.best_val_loss = saved["best_val_loss"]
        self.saved_iteration = saved["iter_num"]  # of the last checkpoint
        self.clock = StepClock(runtime, self.saved_iteration, saved.get("train_seconds", 0.0))
        self.peak = StepPeak(runtime, model, optimizer)
        self.tokens_each = (  # iteration
            settings.gradient_accumulation_steps * settings.batch_size * settings.block_size
        )
        self.evaluation_seconds = 0.0  # that the last one took
        self.log = TrainingLog(runtime.is_main, stop)
        self.folder = None

    def begin(self, folder):
        """Make `folder` (a RunFolder) this run's and leave its first files there.

        A fresh run's state 0 is saved at once: a run killed before its first evaluation can be
        resumed. Raises UserError where something is in the way, an earlier run for one.
        """
        self.log.start_trackers(self.settings)
        moved = folder.begin(self.fresh, self.settings.overwrite, (self.dataset.directory,))
        self.folder = folder
        self.log.open(self.settings, self.saved_iteration)
        if moved:
            self.log.say(moved)
        if self.runtime.is_main:
            write_json(folder.path / CONFIG, self.config)
            state = optimizer_bytes(self.optimizer)
            facts = run_facts(self.model, state, self.dataset, self.runtime)
            write_facts(folder.path, facts)
        if self.saved_iteration == 0:
            self.save(0, LAST)

    def report(self, iteration, loss, norm):
        """The line and row of the iteration just done; times are means since the last one.

        loss: its batch's, before the update. norm: of its gradients, a tensor, or None.
        """
        seconds = self.clock.lap(iteration + 1)
        peak = self.peak.bytes
        self.log.report(
            remaining_seconds(self.settings, iteration + 1, seconds, self.evaluation_seconds),
            **self._progress(iteration),
            loss=loss,
            lr=linear_rate(self.optimizer),
            grad_norm=None if norm is None else norm.item(),
            tokens_per_s=self.tokens_each / seconds,
            ms=1000 * seconds,
            peak_mb=None if peak is None else peak / 1e6,
        )

    def compare_peak(self, fitted):
        """After the step that is measured, one line: its peak as predicted and as it was, of
        several processes the fullest's.

        fitted: a planning.Fitted, with a plan or without."""
        if fitted.plan is not None and self.peak.done == MEASURED + 1 and self.peak.bytes:
            fullest = self.runtime.most_of_processes(self.peak.bytes)
            self.log.say(measured_beside(fitted, fullest))

    def evaluation(self, iteration, losses, seconds):
        """The line and row of an evaluation before `iteration`; then the checkpoints.

        losses: of evaluate. The best is kept in ckpt.pt, the last in ckpt_last.pt. Raises NotFinite
        before anything is saved.
        """
        if not math.isfinite(losses["val"]):
            raise NotFinite("the validation loss", iteration)
        better = 0 < iteration and losses["val"] < self.best_val_loss
        if better:
            self.best_val_loss = losses["val"]
        self.evaluation_seconds = seconds
        self.log.evaluation(
            seconds,
            better,
            **self._progress(iteration),
            train_loss=losses["train"],
            val_loss=losses["val"],
        )
        if better or (iteration > 0 and self.settings.always_save_checkpoint):
            self.save(iteration, BEST, LAST)
        elif iteration != self.saved_iteration:
            self.save(iteration, LAST)

    def save(self, iteration, *names):
        """Write the present state under each name, in that order.

        Raises NotFinite, or GradientNotFinite where weights were moved by one.

        The best comes before the last: killed between the two, the run goes on from the older
        last one, meets the same best again and writes it again.
        """
        if self.folder is None:
            return
        check_gradients(self.optimizer)
        finite = all(bool(local(p).isfinite().all()) for p in self.model.parameters())
        if self.runtime.mean_over_processes([float(finite)]) != [1.0]:
            raise NotFinite("a weight", iteration)
        self.saved_iteration = iteration
        main = self.runtime.is_main
        if main:
            self.log.metrics.sync()
        if main or has_shards(self.model):
            save_run(
                [self.folder.path / name for name in names],
                self.model,
                self.optimizer,
                self.scaler,
                self.dataset,
                self.config,
                main,
                text_files=self.text_files,
                iter_num=iteration,
                best_val_loss=self.best_val_loss,
                train_seconds=self.clock.total,
            )

    def finish(self, iteration):
        """The last words of a run that is done."""
        best = "nothing to keep"
        if math.isfinite(self.best_val_loss):
            best = f"best val loss {self.best_val_loss:.4f}, in {self.folder.path / BEST}"
        seconds = self.clock.total
        self.log.close(f"done: {iteration} iterations, {seconds:.1f} s of training; {best}")

    def interrupt(self, iteration, by):
        """A signal, called `by`, asked for the end: save, and say how to go on."""
        self.clock.stop()
        self.save(iteration, LAST)
        if self.folder is not None:
            self.log.close(
                f"stopped by {by} before iteration {iteration}; {self.folder.path / LAST} is "
                "saved, continue with --init_from=resume"
            )

    def close(self):
        """Whatever the end: no bar in its way, no file or tracker open."""
        self.log.close()

    def _progress(self, iteration):
        """Cells of metrics.csv that every row has."""
        return {
            "iter": iteration,
            "tokens": iteration * self.tokens_each,
            "seconds": round(self.clock.total, 6),
        }
