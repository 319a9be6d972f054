"""The benchmark's short form, and its statistics by hand."""

import benchmark
import pytest

from mmalign.config import load as configs
from mmalign.training import setup


def test_the_exponent_of_a_power_is_exact():
    assert benchmark.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert benchmark.exponent([1, 2, 4], [5, 5, 5]) == pytest.approx(0)


def test_a_spread_is_the_median_and_the_quartiles():
    assert benchmark.spread([5.0, 1.0, 2.0, 3.0, 4.0]) == "3.00 (2.00 to 4.00)"
    assert benchmark.spread([1.5]) == "1.50"


def test_it_measures_a_run(settings):
    run = setup.open_session(configs.build(settings, "test"))
    figures = benchmark.measure(run, 2, (4,))
    assert figures["forwards"] > 0
    assert figures["decodes"] > 0
    assert len(figures["ratio"]) == len(figures["seconds"]) == 2
    assert min(figures["ratio"]) > 1  # sampling, decoding and scoring are not free


def test_the_processor_time_of_a_process_is_its_work():
    idle = benchmark.started(["-c", "import time; time.sleep(1)"])
    assert 0 < idle < 0.9  # waiting does not count
    assert benchmark.started(["-c", "import time\nwhile time.process_time() < 1: pass"]) > 1
    with pytest.raises(RuntimeError, match="ended with 3"):
        benchmark.started(["-c", "raise SystemExit(3)"])
