"""leangpt/memory/losses.json: what the optimizers lose or win, for plans to say.

    python -m experiments.report.plan_losses

Each optimizer at the best of its own grid, on fresh seeds, against tuned AdamW: the rows of
results/optimizer_quality_summary.csv that the README shows, of every variant without options.
"""

import json

from experiments.report.front_tables import SIZES
from experiments.shared.common import RESULTS, read_csv
from leangpt.memory.given_up import LOSSES
from leangpt.optim import VARIANTS
from leangpt.system.whole_files import written_whole

NAMES = ("0.8M", "10.7M", "51M")  # parameters of the models of SIZES


def differences(rows) -> dict:
    """The file's content from the summary's rows."""
    found = {
        variant: [loss_of(rows, setup, iterations, variant) for setup, iterations in SIZES]
        for variant in VARIANTS
    }
    found["adam"] = [0.0] * len(SIZES)
    return {"sizes": list(NAMES), "variants": found}


def loss_of(rows, setup, iterations, variant):
    """Nats against AdamW, or None where this was not measured."""
    for row in rows:
        if (row["setup"], row["iterations"], row["variant"]) == (setup, iterations, variant):
            return row["to_adamw"]
    return None


def main():
    content = differences(read_csv(RESULTS / "optimizer_quality_summary.csv"))
    with written_whole(LOSSES) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
