"""experiments/scale/many_gpus.py on the CPU: a tiny model, as many gloo processes as GPUs."""

import pytest
from tiny_run import run_script

from experiments.shared.common import read_csv


@pytest.mark.slow
@pytest.mark.parametrize(
    "gpus, stages",
    ((2, "124m,8b,long,70b,step"), pytest.param(8, "8b,long", marks=pytest.mark.campaign)),
)
def test_every_stage_makes_its_rows(tmp_path, gpus, stages):
    out = tmp_path / "many.csv"
    result = run_script(
        *("-m", "experiments.scale.many_gpus", f"--gpus={gpus}", "--size=tiny", "--device=cpu"),
        *(f"--stages={stages}", "--steps=1", "--large_steps=1", "--warmup=1", f"--out={out}"),
        *("--layers=1", "--checkpoint_first=1", "--bucket_mb=1"),
    )
    assert result.returncode == 0, result.stderr
    rows = read_csv(out)
    assert {row["stage"] for row in rows} == {*stages.split(",")}
    assert all(row["gpus"] == gpus and row["step_s"] > 0 for row in rows)
    assert {r["checkpoint_first"] for r in rows if r["stage"] == "8b"} <= {1}
    assert {r["layers"] for r in rows if r["stage"] in ("long", "70b")} <= {1}
    for row in rows:
        if row["stage"] != "step":
            assert 3.5 < row["loss"] < 4.7 and row["peak_GB"] > 0 and row["predicted_GB"] > 0
