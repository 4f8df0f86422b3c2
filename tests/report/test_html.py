"""The page of a report: complete, alone, safe, and shown by a real browser."""

import copy
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from matplotlib import image
from torch import nn

import bnguard
from bnguard.findings.audit import audit_document
from bnguard.findings.diff import diff_document
from bnguard.recording.summary import watch_document
from bnguard.records import Finding
from bnguard.report import html as page
from bnguard.report import plots as pictures
from bnguard.report.document import Column, Document, Table
from bnguard.report.tables import drift_table
from tests import forks

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


def test_green_is_for_what_was_looked_at_and_is_clean(tmp_path, monkeypatch):
    """Layers that moved, a model without layers, a script that failed, and a run without layers are on no green."""
    net = nn.Sequential(nn.BatchNorm1d(2))
    before = copy.deepcopy(net)
    net(torch.randn(8, 2))
    reports = {
        "same": diff_document(bnguard.diff(before, before)),
        "moved": diff_document(bnguard.diff(before, net)),
        "audited": audit_document((), before),
        "no layers": audit_document((), nn.Linear(1, 1)),
    }
    assert {name: tone(page.page(report, ())) for name, report in reports.items()} == {
        "same": "clean", "moved": "plain", "audited": "clean", "no layers": "plain"
    }  # fmt: skip
    scripts = {"fails": "layer(x); 1 / 0", "ends well": "layer(x)", "has none": "0"}
    for name, code in scripts.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "t.py").write_text(f"import torch\nlayer, x = torch.nn.BatchNorm1d(1), torch.ones(8, 1)\n{code}\n")
        done = forks.run("-m", "bnguard", "run", "--html", "o.html", "t.py", "--lr", "a b", cwd=folder)
        text = (folder / "o.html").read_text()
        assert tone(text) == ("clean" if name == "ends well" else "plain")
        assert f"exit code of the script: {done.returncode} " in Reader(text).text
        assert "arguments: --lr 'a b' " in Reader(text).text


def tone(text):
    """The colour of the banner."""
    return next(value for name, value in Reader(text).attributes if name == "class" and "verdict" in value).split()[1]


def test_page_says_when_and_with_what_it_was_made(tmp_path):
    """The date with its offset, and the versions of bnguard, torch and Python."""
    page.write(tmp_path / "a.html", Document("", "summary", (), (), about={"exit code": "0", "arguments": ""}), ())
    text = Reader((tmp_path / "a.html").read_text(encoding="utf-8")).text
    date = r"\d{4}-\d\d-\d\d \d\d:\d\d [+-]\d{4}"
    versions = rf"torch {re.escape(torch.__version__)}, Python 3\.\d+\.\d+ on "
    assert re.match(f"exit code: 0 {date}, {versions}", text), text
    assert "arguments" not in text
    assert text.endswith(f"bnguard {bnguard.__version__}")


def test_long_tables_are_folded_beyond_fifty_rows():
    """All rows are there; fifty are seen, the rest can be unfolded."""
    rows = tuple([(f"layer{number}",) for number in range(200)])
    text = page.page(Document("", "", (), (Table("moved", (Column("layer"),), rows, 20),)), ())
    seen, folded = text.split("<details>")
    for number in range(200):
        assert (f">layer{number}<" in seen, f">layer{number}<" in folded) == (number < 50, number >= 50)
    assert "150 more of 200 rows" in Reader(text).text
    assert (
        "details"
        not in Reader(page.page(Document("", "", (), (Table("moved", (Column("layer"),), rows[:50], 20),)), ())).tags
    )


def test_rows_about_layers_with_findings_come_first_and_are_marked():
    """Whatever moved more, such as what trains from scratch; each with the codes."""
    record, _ = watched_page()
    drift = sorted(record.drift, key=lambda one: one.largest)
    finding = Finding("BN001", "t", "warning", drift[0].names, None, "w", "f", "v")
    note = Finding("BN004", "t", "note", drift[1].names, None, "w", "f", "v")
    table = drift_table("moved most", record.drift, 3, (finding, note))
    assert [row[0].split(" ")[0] for row in table.rows] == [drift[1].names[0], drift[0].names[0]]
    text = page.page(Document("", "", (), (table,)), ())
    rows = re.findall(r'<tr( class="marked")?><td class="text">(\S+) .*?<td class="text">(.*?)</td></tr>', text)
    assert rows == [(' class="marked"', drift[0].names[0], "BN001"), ("", drift[1].names[0], "")]
    assert "findings" not in Reader(page.page(Document("", "", (), (drift_table("m", record.drift, 3),)), ())).text


def test_units_are_explained_where_they_stand():
    """Each column with a unit or a term says what it is, on hover and by keyboard."""
    _, text = watched_page()
    explained = dict(re.findall(r'<abbr title="([^"]+)" tabindex="0">(\w+)</abbr>', text))
    titles = {title: meaning for meaning, title in explained.items()}
    assert set(titles) == {
        "updates", "layers", "steps", "mode", "line", "channel", "mean", "variance", "divergence", "findings"
    }  # fmt: skip
    assert "standard deviations (sd)" in titles["mean"]
    assert "nats" in titles["divergence"]


OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_page_fits_the_screen_in_either_colour(tmp_path, width, is_dark):
    """The page takes the colours of the system, pictures too, and only tables and pictures reach beyond a phone."""
    _, text = watched_page()
    path, screen = tmp_path / "report.html", tmp_path / "screen.png"
    path.write_text(text, encoding="utf-8")
    subprocess.run(
        [
            CHROMIUM, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400",
            f"--blink-settings=preferredColorScheme={0 if is_dark else 1}", f"--screenshot={screen}", path.as_uri(),
        ],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    pixels = image.imread(screen)[..., :3]
    background = pixels[5, 5]
    assert (background < 0.2).all() if is_dark else (background > 0.95).all()
    share = (abs(pixels - background).max(axis=2) < 0.03).mean()
    assert share > 0.5  # pictures have the page's background
    margin = pixels[:, -4:]  # nothing touches the edge of the screen
    assert (abs(margin - background).max(axis=2) < 0.03).all()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_real_browser_shows_it(tmp_path):
    """Headless Chromium renders text and pictures: the colours of the heat map and of the lines are on the screen."""
    record, text = watched_page()
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    options = [*OPTIONS, f"--user-data-dir={tmp_path / 'profile'}"]
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
