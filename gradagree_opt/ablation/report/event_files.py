"""TensorBoard event files of a study, each run's made whole from its record."""

import re
import shutil
from pathlib import Path

from gradagree_opt.ablation.report.tables import after
from gradagree_opt.ablation.study.study import Study
from gradagree_opt.ablation.training.run import RunRecord
from gradagree_opt.frameworks import require

require("tensorboard")
from torch.utils.tensorboard import SummaryWriter  # noqa: E402 - after require, whose error names
from torch.utils.tensorboard.summary import hparams  # noqa: E402   the install command


def write_events(folder: Path, study: Study, record: RunRecord) -> None:
    """Writes a run's event file in place of the one that is there, if there is one.

    The validation loss and the diagnostics by outer step, the test scores after the last one, and
    method, rate and seed as hyperparameters.

    Args:
        folder: The run's own is in it, as ``method/rate-0.5/seed-0``.
    """
    run = record.run
    folder = folder / file_name(run.method.name) / f"rate-{run.rate:g}" / f"seed-{run.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    score = study.tasks.measure.column
    tests = {f"test/{score}{after(study, n)}": value for n, value in record.test.items()}
    with SummaryWriter(str(folder)) as writer:
        settings = {"method": run.method.name, "rate": run.rate, "seed": run.seed}
        found = {"validation loss": record.validation} | tests
        for summary in hparams(settings, found):  # type: ignore[no-untyped-call] # torch's has no types
            writer.file_writer.add_summary(summary)
        for point in record.curve:
            writer.add_scalar("validation loss", point.loss, point.iteration)
            for name, value in point.diagnostics.items():
                writer.add_scalar(f"diagnostics/{name}", value, point.iteration)
        for name, value in tests.items():
            writer.add_scalar(name, value, record.curve[-1].iteration)


def file_name(method: str) -> str:
    """A method's name as that of a folder, other names as other folders."""
    return re.sub(r'[%/\\:*?"<>|\0]|^\.', lambda found: f"%{ord(found[0]):02X}", method)
