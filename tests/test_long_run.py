"""Hundreds of iterations: memory and open files do not grow after the first few."""

import psutil
import pytest
from run_config import rows, run

from mmalign import run as runs

SETTLED = 10  # iterations until caches are full


@pytest.mark.slow
def test_memory_and_open_files_stay_flat(settings, monkeypatch, capsys):
    process, iterate, memory, files = psutil.Process(), runs.iterate, [], []

    def measured(*args):
        memory.append(process.memory_info().rss)
        files.append(process.num_fds())
        return iterate(*args)

    monkeypatch.setattr(runs, "iterate", measured)
    out = run(settings, iterations=300, eval_every=50, checkpoint_every=20, max_kl=1e9, max_skips=1)
    assert len(rows(out / "metrics.jsonl")) == 300
    first, most = memory[SETTLED], max(memory[SETTLED:])
    with capsys.disabled():
        print(
            f"\nresident {first / 2**20:.1f} MiB after {SETTLED} iterations, then at most {most / 2**20:.1f} MiB "
            f"({most / first - 1:+.1%}), at last {memory[-1] / 2**20:.1f} MiB; "
            f"open files {files[SETTLED]}, then at most {max(files[SETTLED:])}"
        )
    assert most <= 1.03 * first
    assert max(files[SETTLED:]) <= files[SETTLED]
