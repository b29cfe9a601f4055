"""What a training run says: console lines, rows of metrics.csv, a progress bar, optional trackers.

Lines are plain text, one a report, so that `grep ^iter log.txt` works; the bar is drawn on a
terminal only. What cannot be said costs no training: of a terminal that goes away SIGHUP decides; a
reader that goes away (`| head`) ends the run as a signal does, saved; where the disk of a log is
full the run goes on to its end, says so, and ends with status 1.
"""

import contextlib
import errno
import signal
import sys
from datetime import timedelta
from pathlib import Path

from leangpt.runs.metrics import MetricsFile
from leangpt.runs.run import METRICS
from leangpt.system.errors import RunError, UserError, discard
from leangpt.system.stopping import StopSignal

TERMINAL_GONE = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.EBADF)


class TrainingLog:
    """Everything a run reports. Only the main process of several has one that does anything."""

    def __init__(self, is_main: bool, stop: StopSignal):
        """A log that only speaks, until `open`. stop: told where nobody reads it any more."""
        self.is_main, self.stop = is_main, stop
        self.unheard = None  # the error that standard output gave
        self.bar = self.wandb = self.board = self.metrics = None
        self.board_class = None  # tensorboard's, where it is asked for

    def start_trackers(self, settings):
        """Those that settings ask for; touches no file of out_dir. Raises UserError where one is
        not installed or does not start."""
        if not self.is_main:
            return
        if settings.tensorboard_log:
            self.board_class = _summary_writer()
        if settings.wandb_log:
            self.wandb = _start_wandb(settings)

    def open(self, settings, first_iteration=0):
        """metrics.csv in out_dir, tensorboard's folder, the bar. Raises UserError where they cannot
        be written."""
        if not self.is_main:
            return
        out_dir = Path(settings.out_dir)
        self.metrics = MetricsFile(out_dir / METRICS, first_iteration)
        if self.board_class is not None:
            self.board = self.board_class(out_dir / "tensorboard")
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
        """Print lines, above the bar if there is one."""
        if not self.is_main:
            return
        if self.bar is not None:
            self.bar.clear()
        try:
            print(text, flush=True)
        except OSError as error:
            self._take_for_unheard(error)
        if self.bar is not None:
            self.bar.refresh()

    def _take_for_unheard(self, error):
        discard(sys.stdout)
        if error.errno in TERMINAL_GONE:
            return
        self.unheard = error
        if isinstance(error, BrokenPipeError):
            self.stop.ask(getattr(signal, "SIGPIPE", signal.SIGTERM))  # Windows lacks the first
            return
        with contextlib.suppress(OSError, ValueError):
            print(
                f"note: standard output takes no more ({error.strerror}): the run goes on without",
                file=sys.stderr,
                flush=True,
            )

    def raise_if_unheard(self):
        """At the end of a run. Raises RunError, or BrokenPipeError, where lines went nowhere."""
        if isinstance(self.unheard, BrokenPipeError):
            raise self.unheard
        if self.unheard is not None:
            raise RunError(
                f"the run is done, but not all it said is written: {self.unheard.strerror}"
            )

    def advance(self):
        """One more iteration is done."""
        if self.bar is not None:
            self.bar.update()

    def report(self, eta_seconds, **cells):
        """A line and a row on one iteration. cells: metrics.COLUMNS."""
        norm, peak = cells["grad_norm"], cells["peak_mb"]
        self.say(
            f"iter {cells['iter']}: loss {cells['loss']:.4f}, lr {cells['lr']:.3e}, "
            + (f"norm {norm:.3f}, " if norm is not None else "")
            + f"{cells['tokens_per_s']:.0f} tok/s, {cells['ms']:.1f} ms, "
            + (f"peak {peak:.1f} MB, " if peak is not None else "")
            + f"eta {timedelta(seconds=round(eta_seconds))}"
        )
        self._record(cells)

    def evaluation(self, took, is_best, **cells):
        """A line and a row on one evaluation, which took `took` seconds. cells as above."""
        best = " (best)" if is_best else ""
        self.say(
            f"step {cells['iter']}: train loss {cells['train_loss']:.4f}, "
            f"val loss {cells['val_loss']:.4f}{best}, evaluated in {took:.1f} s"
        )
        self._record(cells)

    def _record(self, cells):
        if self.metrics is None:
            return
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
            self.metrics.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.board is not None:
            self.board.close()
        self.metrics = self.wandb = self.board = None


def remaining_seconds(settings, iteration, seconds_each, evaluation_seconds):
    """How long a run still takes after `iteration` iterations, at the pace of the last ones."""
    interval = settings.eval_interval or settings.max_iters
    evaluations = settings.max_iters // interval - (iteration - 1) // interval
    return (settings.max_iters - iteration) * seconds_each + evaluations * evaluation_seconds


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


def _summary_writer():
    """tensorboard's class, to be called with a folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "tensorboard_log=True needs the package tensorboard: pip install "
            "tensorboard, or leave tensorboard_log out"
        ) from None
    return SummaryWriter
