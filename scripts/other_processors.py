"""Run the tests with the arithmetic of other processors: the verdicts must be those of scripts/test.sh.

    .venv/bin/python scripts/other_processors.py              # every row of PROCESSORS, about five minutes each
    .venv/bin/python scripts/other_processors.py tests/flow   # arguments go to pytest

Each row sets the instruction sets that torch's kernels, oneDNN and MKL may use, and torch's number of threads. A test
that changes its verdict compares values that are equal only to rounding, after a discontinuous score (a JPEG's bytes, a
strict verdict, OCR): give it a smooth reward.
"""

import os
import subprocess
import sys
from pathlib import Path

PROCESSORS = [  # ATen, oneDNN, MKL, threads
    ("default", "SSE41", "SSE4_2", 1),
    ("default", "AVX2", "AVX2", 2),
    ("avx2", "AVX2", "AVX2", 1),
    ("avx2", "AVX2", "AVX2", 2),
    ("avx512", "ALL", "AVX512", 2),
]


def tested(aten: str, onednn: str, mkl: str, threads: int, arguments: list[str]) -> int:
    """The exit code of pytest in the environment of one row."""
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "OMP_NUM_THREADS": str(threads),
        "MMALIGN_TEST_THREADS": str(threads),
    }
    command = [sys.executable, "-m", "pytest", "-n", "2", *arguments]
    return subprocess.run(command, env=environment, cwd=Path(__file__).parents[1]).returncode


def main(arguments: list[str]) -> int:
    failed = []
    for row in PROCESSORS:
        print("ATen {}, oneDNN {}, MKL {}, {} thread(s)".format(*row), flush=True)
        if tested(*row, arguments):
            failed.append(row)
    print(f"{len(PROCESSORS) - len(failed)} of {len(PROCESSORS)} rows passed", *failed, sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
