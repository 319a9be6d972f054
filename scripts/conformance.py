"""The table of model families and the properties that hold for each, from a run of the conformance test.

python scripts/conformance.py
"""

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

PROPERTIES = {
    "test_ode_sampling_is_the_stock_pipeline": "ODE = stock pipeline",
    "test_rows_at_their_own_times_are_rows_alone": "own times",
    "test_the_ratio_on_policy_is_one": "ratio 1",
    "test_lora_off_is_the_untouched_model_to_the_bit": "LoRA off",
    "test_the_exported_lora_gives_our_images_in_the_stock_pipeline": "export",
    "test_gradient_checkpointing_changes_nothing": "checkpointing",
    "test_guidance_and_prompts_matter": "guidance, prompts",
}
CASE = re.compile(r"(\w+)\[(?:\d-)?(.+?)(?:-\d+\.\d+)?\]")  # test[place-family-guidance]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/policy/test_conformance.py", f"--junitxml={report}"]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        cases = ElementTree.parse(report).iter("testcase")
    passed: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        named = CASE.fullmatch(case.attrib["name"])
        if named and named[1] in PROPERTIES:
            passed[named[2]][named[1]].append(len(case) == 0)  # a failure is a child
    print(f"| family | {' | '.join(PROPERTIES.values())} |")
    print("|---|" + "---|" * len(PROPERTIES))
    for family, cases in passed.items():
        marks = [f"{sum(cases[name])} of {len(cases[name])}" if cases[name] else "not tried" for name in PROPERTIES]
        print(f"| {family} | {' | '.join(marks)} |")


if __name__ == "__main__":
    main()
