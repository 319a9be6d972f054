"""What a selection leaves of a rollout: the rows of the selected trajectories, in all that has a row for each."""

from dataclasses import fields

import torch

from mmalign.config import load as configs
from mmalign.training import selecting
from mmalign.training.rollout import judged, sample_and_score
from mmalign.training.setup import open_session


def test_all_that_has_a_row_for_each_trajectory_is_cut_alike():
    """With a value head, log-ratios and rewards of ends alone, whose columns a run without them does not have."""
    credit = ["value", "prl", "gain"]
    rewards = {"shapes.partial": 1.0, "jpeg_size.kilobytes": {"weight": 0.1, "density": "end"}}
    c = configs.build(
        dict(
            plan="sde", seeds=4, steps=3, prompts_per_iteration=2, credit=credit, rewards=rewards, held_out=None,
            select={"type": "extremes", "keep": 2}, lora_targets=["norm1.linear"], lora_rank=2,
        ),
        "test",
    )  # fmt: skip
    run = open_session(c)
    rollout = sample_and_score(run, run.prompts(0), 0)
    report = judged(run, rollout, 0)
    selected = torch.tensor([True, False, False, True, False, True, True, False])
    less, verdict, _ = selecting.part(rollout, report, None, selected)
    for before, after in ((rollout.paths, less.paths), (report, verdict), (rollout, less)):
        for field in fields(before):
            whole, some = getattr(before, field.name), getattr(after, field.name)
            if isinstance(whole, torch.Tensor) and len(whole) == 8 and field.name != "finals":
                assert torch.equal(some, whole[selected]), field.name
    assert {"features", "x"} <= {f.name for f in fields(rollout.paths) if getattr(rollout.paths, f.name) is not None}
    assert len(less.deviation) == len(verdict.log_ratio) == len(verdict.ends) == 4
