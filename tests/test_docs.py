"""The pages that the build of the documentation makes: they say what the program and the results say."""

import configparser
import json
import re

import pytest

import bnguard
from bnguard import testing
from bnguard.findings.codes import CODES
from docs import diagrams, pages
from tests import forks
from tests.readme import PAGES

INTEGRATIONS = sorted((pages.ROOT / "bnguard/integrations").glob("[a-z]*.py"))
ROWS = json.loads((pages.RESULTS / "cpu.json").read_text(encoding="utf-8"))["rows"]


def letters(text):
    """The letters and digits of a text, whatever marks code, headings and lists."""
    return re.sub(r"[\W_]", "", text)


@pytest.mark.parametrize("code", CODES)
def test_page_of_a_finding_has_the_text_of_explain(code):
    """Every paragraph of ``bnguard explain`` is on the page."""
    page = letters(pages.finding(code))
    for paragraph in forks.run("-m", "bnguard", "explain", code).stdout.split("\n\n"):
        if not paragraph.startswith(("BN", "Then ignore it:")):
            for part in re.split(r"^[A-Z][a-z ]+:$|^  - ", paragraph, flags=re.M):
                assert letters(part) in page


def test_every_finding_has_its_page():
    """One page a code."""
    assert {name for name in pages.made() if name.startswith("findings/")} == {
        f"findings/{c.lower()}.md" for c in CODES
    }


def test_costs_are_those_of_the_results():
    """The summary is computed."""
    for what, value in pages.summary(ROWS):
        assert f"| {what} | {value} |" in pages.costs()


def test_pages_from_elsewhere_link_to_pages_only():
    """Links to files that are not part of the documentation are paths."""
    for name, make in pages.made().items():
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", make()):
            folder = (pages.DOCS / name).parent
            made = {(pages.DOCS / page).resolve() for page in pages.made()}
            assert (folder / target).resolve().is_file() or (folder / target).resolve() in made, target


def test_every_public_name_is_in_the_reference():
    """What ``dir()`` lists, and what the public modules list."""
    reference = "".join(PAGES[path] for path in PAGES if path.startswith("docs/api/"))
    names = [f"bnguard.{name}" for name in bnguard.__all__ if name != "__version__"]
    names += [f"bnguard.testing.{name}" for name in testing.__all__]
    names += [f"bnguard.integrations.{path.stem}" for path in INTEGRATIONS]
    for name in names:
        assert re.search(rf":: {re.escape(name)}$", reference, re.MULTILINE), name


def test_every_extra_for_users_is_listed():
    """Those for development are in CONTRIBUTING.md."""
    setup = configparser.ConfigParser()
    setup.read(pages.ROOT / "setup.cfg")
    for extra in set(setup["options.extras_require"]) - {"bench", "dev", "docs", "test"}:
        assert re.search(rf"^\| .*`{extra}`.* \|", PAGES["docs/install.md"], re.MULTILINE), extra


def test_picture_has_a_panel_for_each_policy():
    """No guard, and five ways to write a block."""
    picture = diagrams.policies()
    assert picture.count("<figure>") == 6
    for on_change in ("restore", "rollback", "warn"):
        assert f"frozen(model, &quot;{on_change}&quot;)" in picture
