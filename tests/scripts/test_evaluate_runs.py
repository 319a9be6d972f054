"""The table of several runs on one list of prompts."""

import evaluate_runs
import pytest
from run_config import run

from mmalign.errors import BadInput
from mmalign.reporting import report


def test_a_table_of_two_runs(settings, tmp_path, capsys):
    changed = dict(iterations=2, eval_every=0, learning_rate=0.05)
    runs = [run(settings, seed=seed, out=str(tmp_path / str(seed)), **changed) for seed in (0, 1)]
    capsys.readouterr()
    evaluate_runs.main(runs, settings["held_out"], "jpeg_size", steps=2, seeds=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 images of 2 captions a side, 2 ODE steps"
    cells = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    rises = [report.summary(path)["rises"]["jpeg_size.kilobytes"] for path in runs]
    assert cells[:2] == ["`jpeg_size.kilobytes`", f"{rises[0]['before']:.3f}"]
    assert cells[2] == ", ".join(f"{row['after']:.3f}" for row in rises)
    assert float(cells[3]) == pytest.approx(sum(row["rise"] for row in rises) / 2, abs=1e-3)
    assert " to " in cells[4]


def test_runs_of_two_base_models_are_refused(settings, tmp_path, monkeypatch):
    runs = [run(settings, iterations=1, held_out=None, out=str(tmp_path / "one"))] * 2
    names = iter(["one", "other", "other"])
    monkeypatch.setattr("mmalign.policy.pipeline.PipelinePolicy.fingerprint", lambda policy: next(names))
    with pytest.raises(BadInput, match="has another base model"):
        evaluate_runs.main(runs, settings["held_out"], "jpeg_size", steps=1, seeds=2)
