"""Replies of judges: how a score is written, what looks like a score and is none, and text made to take long.

A new report is one more entry. `{n}` stands for the number.
"""

WRAPPINGS = [  # each holds the score `{n}` on a scale up to `{high}`, and must be read as just that
    "{n}", " {n} ", "**{n}**", "*{n}*", "__{n}__", "`{n}`", '"{n}"', "'{n}'", "“{n}”", "({n})", "[{n}]", "{{{n}}}", "~{n}",
    "≈ {n}", "about {n}", "approximately {n}", "${n}$", "\\boxed{{{n}}}", "$\\boxed{{{n}}}$", "\\(\\boxed{{\\text{{{n}}}}}\\)",
    "<score>{n}</score>", "{n}/{high}", "{n} / {high}", "**{n}**/{high}", "({n})/{high}", "{n} out of {high}", "{n} of {high}",
    "{n} (out of {high})", "{n} points", "{n} pts out of {high}", "{n}/{high} points", "{n}.", "{n}!", "{n}; fine",
    "{n}, fine", "{n} - fine", "{n} — fine", "{n} (fine)", "{n}: fine", "{n}. It is fine.", "{n}\t", "{n}\r",
]  # fmt: skip
UNCLEAR = [  # none of these is one number alone on a scale from 1 to 4
    "1 to 4, I give 4", "1 or 4", "1—4", "1–4", "1-4", "3-4", "3 - 4", "1 of 10", "1 out of 10", "1/2", "8/10", "1%", "80%",
    "1e999", "1e0", "1,000", "1.000.000", "1.2.3", "1..4", "1…4", "1:4", "1 = 4", "3,5,7", "3 4", "3*4", "3~4", "~~3~~ 4",
    "between 2 and 3", "2 and 3", "[3, 4]", "3; 4", "3 (or 4)", "(3 or 4)", "three or four", "three-four",
    "three and a half", "three point five", "3½", "½", "2^2", "<3", ">3", "≤3", "3+", "3-", "3x", "x3", "0x3", "3k",
    "3 million", "3°", "-1", "−3", "7", "0", "not 3", "at least 3", "3 good", "good", "", "-", "?", "TBD", "true", "yes",
    "3 of 4 or 5", "None of 3", "N/A or 3", "<1 to 4>", "$3 - $4", "3 = good, 4 = better", "3/4/5", "3/", "4/5",
    "9" * 400, "1" + "0" * 30, "3.5²", "3.5①", "²", "3⁄4", "1 (percent)", "1 (%)", "3 (four at best)", "3 - maybe four",
    "3 (二)", "3 (½ off)", "3, or one", "3/4 (75%)",
]  # fmt: skip
ENDLESS = [  # repeated without end, each has made a pattern of some reader look again and again
    "* \n", "*", "* ", "#", "# ", "-", "- ", "_", "`", ">", " ", "\t", "\n", "\r\n", "[", "{", "(", '{"a":', '{"a": [', "[{",
    "[1,", '["', '{"', '[{"score": 1},', "]", "}", '"', "'", "\\", '\\"', "<think>", "</think>", "<answer>", "<answer>1",
    "</answer>", "Score", "Score:", "Score: ", "score \n", "Score:\n", "## Score: 3\n", "Region", "Region 1\n",
    "Region 1:\nBox: [", "box", "Box: (", "**1.", "1. ", "1.", "1:", "1) yes\n", "3", "3.", ",", ".", "/", "n/", "N/A ",
    "Text Faithfulness", "Text Faithfulness:\n", "Text Faithfulness (", "Refined Request:", "Refined Request:\n",
    "Justification:", "Detailed Judgement\n", "Summary", "Winner: ", "Image 1 is better", "the image ", "Alignment Score (",
    "\\boxed{", "$", "~", "about ", "out of ", "three ", " - ", "—", "９", "\u2028", "\x00", "é", "```\n", "reason: \n",
]  # fmt: skip
