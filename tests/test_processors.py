"""The suite's verdicts do not hang on the processor: all of it, with the arithmetic of another one."""

import other_processors
import pytest


@pytest.mark.slow
def test_the_suite_passes_with_the_oldest_instructions_and_two_threads():
    assert other_processors.tested("default", "SSE41", "SSE4_2", 2, []) == 0
