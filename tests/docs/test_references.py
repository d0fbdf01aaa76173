"""The pages that docs/hooks.py makes name what the code has."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_results_page_names_what_every_rule_makes(hooks):
    page = hooks.results()
    rules = "".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    making = re.findall(r"rule (\w+):\n(?:(?!\s*rule ).*\n)*? +output:\n", rules)
    named = set(re.findall(r"\| `results/{experiment}/[^`]+` \| `(\w+)` \|", page))
    assert len(making) > 20 and set(making) == named
    assert not re.search(r"(?m)^\|---.*\n(?!\|)", page), "a table has rows"
    tables = {path.stem for path in (ROOT / "results/demo/tables").glob("*.md")}
    assert tables and tables <= set(re.findall(r"(?m)^\| `(\w+)` \|", page))


def test_every_flag_and_argument_says_what_it_is(hooks):
    """No line of the command line's page ends at the type, or goes on with the default alone."""
    lines = re.findall(r"(?m)^\* `.*$", hooks.command_line())
    assert len(lines) > 100 and not [line for line in lines if re.search(r"`(?:: \[.*)?$", line)]
