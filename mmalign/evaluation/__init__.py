"""Held-out evaluation, best of N, and what benchmarks expect of both."""

from typing import Literal

Layout = Literal["mmalign", "geneval", "t2i_compbench"]  # of the folder that an evaluation writes
Choose = Literal["extremes", "all"]  # which images of a prompt make pairs: the best and the worst, or every two
