"""A reply in the form judges are asked for, and all that reads replies."""

from reward_models.scorers import checklist, pairwise, rational, unified, visual_erm
from reward_models.vlm import critiques, replies

IMAGE = {name: rational.ASPECTS[name] for name in rational.TASKS["image"]}
EDIT = rational.ASPECTS

FULL = """# User Request Analysis
A red circle.
# Detailed Judgement
1. Text Faithfulness:
## Justification: The circle is there and it is red.
## Score: 3.5
2. Physical and Visual Quality:
## Justification: Slight fringe.
## Score: 3
3. Text Rendering:
## Justification: No text was asked for.
## Score: N/A
# Summary: good
# User Request Refinement:
## Refinement Comments: say how large
## Refined Request: a large red circle on a plain ground
"""
SIZE = (32, 48)
READERS = {
    "critique": lambda text: critiques.read(text, EDIT),
    "unified 1": lambda text: unified.read(text, 1),
    "unified 2": lambda text: unified.read(text, 2),
    "pair": pairwise.read,
    "verdicts": lambda text: checklist.read(text, 3, SIZE),
    "discrepancies": lambda text: visual_erm.read(text, SIZE, 50),
    "criteria": lambda text: checklist.criteria_of(checklist._criteria_rows(text)),
    "overall": replies.overall,
    "places": lambda text: replies.read_regions(text, SIZE),
    "places by number": lambda text: replies.read_regions(text, SIZE, proposed=[(0, 0, 8, 8), (8, 8, 16, 16)]),
}
