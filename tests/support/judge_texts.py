"""A reply in the form judges are asked for."""

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
