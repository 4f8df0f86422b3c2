"""The page of a report: complete, alone, safe, and shown by a real browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from matplotlib import image
from torch import nn

import bnguard
from bnguard.recording.summary import watch_document
from bnguard.records import Finding
from bnguard.report import html as page
from bnguard.report import plots as pictures
from bnguard.report.document import Column, Document, Table

VOID = {"meta", "img"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Reader(HTMLParser):
    """Takes a page apart, and minds that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID and tag != "td" and tag != "tr" and tag != "th":
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("td", "tr", "th"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def watched_page():
    """The page of a run with a finding, and its record."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with bnguard.watch(net, every=1) as record:
        for _ in range(5):
            net(torch.randn(16, 4)).square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            net(torch.randn(16, 4))
    document = watch_document(record.summary())
    drawn = pictures.watch_pictures(record.drift, record.series, record.update_series)
    return record, page.page(document, drawn)


def test_everything_is_on_it():
    """The verdict first, then findings, tables with all rows, and pictures with a description."""
    record, text = watched_page()
    found = Reader(text)
    (finding,) = record.findings
    for sentence in (finding.verdict, finding.what, finding.title, finding.where):
        assert sentence in found.text
    assert found.text.index(finding.verdict) < found.text.index(finding.title) < found.text.index("updates layers")
    for update in record.updates:
        assert update.where in found.text
    assert found.tags.count("img") == 3
    descriptions = [value for name, value in found.attributes if name == "alt"]
    assert all(description.endswith(".") for description in descriptions)
    assert any("moved most" in description for description in descriptions)


def test_it_needs_nothing_else():
    """No script, no address but data, and a policy that forbids a browser to load anything."""
    _, text = watched_page()
    found = Reader(text)
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    sources = [value for name, value in found.attributes if name in ("src", "href")]
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import", text)


def test_names_are_text_and_no_markup():
    """Whatever a layer, a line or a message is called."""
    evil = '<img src=x onerror="alert(1)">&'
    finding = Finding("BN001", evil, "warning", (evil,), evil, evil, evil, evil)
    table = Table(evil, (Column(evil), Column(evil, is_number=True)), ((evil, evil),), 1)
    text = page.page(Document(evil, evil, (finding,), (table,), evil, (evil,), evil), ())
    assert "<img" not in text
    found = Reader(text)
    assert set(found.tags) & {"img", "script"} == set()
    assert found.text.count(evil) >= 10


def test_clean_report_says_so():
    """Without a finding the summary leads."""
    found = Reader(page.page(Document("", "no finding; 3 updates of 1 layer", (), ()), ()))
    assert found.text.startswith("no finding; 3 updates of 1 layer")
    assert ("class", "verdict clean") in found.attributes
    assert "Findings" not in found.text


def test_long_tables_can_be_folded():
    """All rows are there; more than are shown elsewhere can be folded away."""
    table = Table("moved", (Column("layer"),), tuple([(f"layer{number}",) for number in range(200)]), 20)
    found = Reader(page.page(Document("", "", (), (table,)), ()))
    assert "details" in found.tags
    assert "200 rows" in found.text
    assert all(f"layer{number}" in found.text for number in range(200))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_real_browser_shows_it(tmp_path):
    """Headless Chromium renders text and pictures: the colours of the heat map and of the lines are on the screen."""
    record, text = watched_page()
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    dom = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert record.findings[0].verdict in Reader(dom).text
    screen = tmp_path / "screen.png"
    subprocess.run(
        [CHROMIUM, *options, "--window-size=1100,2600", f"--screenshot={screen}", path.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    pixels = image.imread(screen)[..., :3]
    assert pixels.shape[:2] == (2600, 1100)
    for red, green, blue in ((0.99, 0.90, 0.21), (0.0, 0.45, 0.70), (0.84, 0.37, 0.0)):  # cividis' end, two lines
        near = abs(pixels - (red, green, blue)).max(axis=2) < 0.06
        assert near.sum() > 150, (red, green, blue)
    broken = text.replace("data:image/svg+xml", "https://example.org/svg+xml")
    path.write_text(broken, encoding="utf-8")
    subprocess.run(
        [CHROMIUM, *options, "--window-size=1100,2600", f"--screenshot={screen}", path.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    pixels = image.imread(screen)[..., :3]
    assert (abs(pixels - (0.99, 0.90, 0.21)).max(axis=2) < 0.06).sum() == 0
