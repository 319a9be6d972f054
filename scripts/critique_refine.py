"""The critique-refine loop: `mmalign refine` under another name.

python scripts/critique_refine.py "a circle and a square" --html page.html
"""

import typer

from mmalign.cli.refine import refine

if __name__ == "__main__":
    typer.run(refine)
