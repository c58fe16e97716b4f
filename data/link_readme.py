"""Write the line numbers of scratchformer.py's chapters into the links of README.md.

    python data/link_readme.py

A test fails while they are out of date.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RULE = "# " + "-" * 88

lines = (ROOT / "scratchformer.py").read_text(encoding="utf-8").splitlines()
line_of = {
    match[1]: number
    for number, line in enumerate(lines, 1)
    if lines[number - 2] == RULE and (match := re.match(r"# (\d+)\. ", line))
}
readme = ROOT / "README.md"
text = re.sub(
    r"(\[(\d+)\. [^]]*\]\(scratchformer\.py#L)\d+",
    lambda match: match[1] + str(line_of[match[2]]),
    readme.read_text(encoding="utf-8"),
)
readme.write_text(text, encoding="utf-8")
