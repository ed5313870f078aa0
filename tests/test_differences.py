import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_test_that_the_list_of_differences_names_exists():
    named = set(re.findall(r"`(test_\w+(?:\.py)?)`", (ROOT / "doc/differences.md").read_text()))
    files = list((ROOT / "tests").glob("test_*.py"))
    functions = re.findall(r"^def (test_\w+)", "\n".join(f.read_text() for f in files), re.M)
    assert len(named) > 20
    assert not named - set(functions) - {file.name for file in files}
