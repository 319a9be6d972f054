"""The parts of an iteration, and of a calibration of the noise."""

from typing import Literal

Rule = Literal["paper", "z"]  # when a calibration raises the noise of a step
