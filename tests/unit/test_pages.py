"""The pages that bt writes, in a browser: at a desk and on a phone, light and dark, on paper.

Needs Debian's chromium; Playwright drives it and downloads none of its own.
"""

import io
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from tests.unit import sample_pages

PAGES = (
    "report/report.html",
    "report/checklist.html",
    "audit.html",
    "explored/explore.html",
    "leaderboard.html",
)
WIDTHS = {"desk": 1280, "phone": 360}
PAPER = {"width": 718, "height": 1047}  # A4 at 96 dots an inch within margins of 1 cm

FACTS = """() => {
  const canvas = document.body.appendChild(document.createElement("i"));
  canvas.style.background = "Canvas";
  const ground = getComputedStyle(canvas).backgroundColor;
  canvas.remove();
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), own = walker.currentNode.parentElement;
    if (!text) continue;
    let behind = own;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)")
      behind = behind.parentElement;
    texts.push({
      text: text, tag: own.tagName, size_px: parseFloat(getComputedStyle(own).fontSize),
      colour: getComputedStyle(own).color, shown: own.checkVisibility(),
      behind: behind ? getComputedStyle(behind).backgroundColor : ground,
    });
  }
  const tables = [...document.querySelectorAll("table")].map(table => {
    const box = table.parentElement, cell = table.querySelector("td:first-child");
    return {
      overflow: getComputedStyle(box).overflowX, box_px: box.clientWidth, px: table.offsetWidth,
      name_px: cell.offsetWidth, heads: [...table.querySelectorAll("th")].map(h => h.innerText),
    };
  });
  return {
    ground, texts, tables, title: document.title, language: document.documentElement.lang,
    width_px: document.documentElement.scrollWidth,
    headings: [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map(h => +h.tagName[1]),
    images: [...document.images].map(i => ({alt: i.alt, px: i.naturalWidth, shown_px: i.width})),
  };
}"""
DECODED = """() => Promise.all(
  [...document.images].map(image => image.decode().then(() => true, () => false))
)"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("pages")
    shortcuts = sample_pages.write_explore_page(out)
    sample_pages.write_report_pages(out / "report", shortcuts)
    sample_pages.write_audit_page(out)
    sample_pages.write_leaderboard_page(out)
    return out


class Opened:
    """A page in the browser, everything folded away unfolded, and what was heard meanwhile."""

    def __init__(self, browser, address, width, scheme):
        self.heard, self.requests = [], []
        viewport = {"width": width, "height": 800}
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme)
        self.page.set_default_timeout(120_000)  # other work may leave the browser little time
        self.page.on("console", lambda m: self.heard.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda error: self.heard.append(f"error: {error}"))
        self.page.on("requestfailed", lambda r: self.heard.append(f"failed: {r.url[:80]}"))
        self.page.on("request", lambda r: self.requests.append(r.url[:80]))
        self.page.goto(address)
        self.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        self.decoded = self.page.evaluate(DECODED)
        self.facts = self.page.evaluate(FACTS)


@pytest.fixture(
    scope="module",
    params=[(name, width, s) for name in PAGES for width in WIDTHS for s in ("light", "dark")],
    ids=lambda param: "-".join(param).replace("/", "."),
)
def opened(request, browser, folder):
    name, width, scheme = request.param
    shown = Opened(browser, (folder / name).as_uri(), WIDTHS[width], scheme)
    yield shown
    shown.page.close()


def luminance(colour):
    """Return the relative luminance of a computed colour, as WCAG 2 has it."""
    assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", colour), f"{colour} is not opaque"
    rgb = np.array([int(part) for part in re.findall(r"\d+", colour)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(text):
    lights = sorted(luminance(text[key]) for key in ("colour", "behind"))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def test_a_page_is_quiet_and_asks_nothing_of_the_network(opened):
    assert opened.heard == []
    assert opened.requests
    assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []


def test_every_picture_is_there_and_has_words_for_it(opened):
    images = opened.facts["images"]
    if "checklist" not in opened.page.url:
        assert images
    assert all(image["alt"].strip() and image["px"] > 0 for image in images), images
    assert all(opened.decoded)
    assert all(image["shown_px"] > 100 for image in images), images


def test_only_tables_and_panels_scroll_sideways_and_rows_keep_their_names(opened):
    width = opened.page.viewport_size["width"]
    assert opened.facts["width_px"] <= width
    for table in opened.facts["tables"]:
        assert table["overflow"] == "auto", table
        assert table["box_px"] <= width, table
        if width == WIDTHS["desk"] and "leaderboard" not in opened.page.url:
            assert table["px"] <= table["box_px"], table
        # The first column stays in sight; were it as wide as the box, no other would be seen.
        assert table["px"] <= table["box_px"] or table["name_px"] < 0.6 * table["box_px"], table


def test_text_can_be_read_in_both_schemes(opened):
    texts = opened.facts["texts"]
    assert len(texts) > 20
    assert all(text["shown"] for text in texts)
    assert [text for text in texts if text["size_px"] < 12] == []
    assert [text for text in texts if contrast(text) < 4.5] == []


def test_a_page_follows_the_scheme(opened):
    dark = opened.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (luminance(opened.facts["ground"]) < 0.2) == dark
    shot = opened.page.screenshot(clip={"x": 0, "y": 0, "width": 1, "height": 1})
    seen = "rgb({}, {}, {})".format(*Image.open(io.BytesIO(shot)).convert("RGB").getpixel((0, 0)))
    assert seen == opened.facts["ground"], "the contrast is that of what is painted"


def test_a_page_says_its_language_and_title_and_no_heading_skips_a_level(opened):
    assert opened.facts["language"] == "en"
    assert opened.facts["title"].strip()
    levels = opened.facts["headings"]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels)), levels
    assert all(head.strip() for table in opened.facts["tables"] for head in table["heads"])


def test_no_value_is_shown_as_the_program_writes_it(opened):
    raw = re.compile(r"\{\{|\{%|^None$|\b(nan|inf|True|False|undefined)\b")
    assert [own["text"] for own in opened.facts["texts"] if raw.search(own["text"])] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_printed_dark_on_white_and_no_table_is_cut(browser, folder, name):
    opened = Opened(browser, (folder / name).as_uri(), 1280, "dark")
    paper = PAPER
    if name == "leaderboard.html":  # which asks for paper on its side
        paper = {"width": PAPER["height"], "height": PAPER["width"]}
    opened.page.set_viewport_size(paper)
    opened.page.emulate_media(media="print", color_scheme="dark")
    facts = opened.page.evaluate(FACTS)
    assert luminance(facts["ground"]) > 0.9
    assert all(contrast(text) >= 4.5 for text in facts["texts"])
    assert {table["overflow"] for table in facts["tables"]} <= {"visible"}
    assert facts["width_px"] <= paper["width"]
    pdf = opened.page.pdf(prefer_css_page_size=True, format="A4")
    assert pdf.startswith(b"%PDF-")
    num_pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert num_pages >= (4 if "report.html" in name or "explore" in name else 1)
    opened.page.close()


def test_links_lead_from_page_to_page(browser, folder):
    for name in PAGES:
        place = folder / name
        targets = re.findall(r'<a href="([^"]*)"', place.read_text())
        assert all((place.parent / target).is_file() for target in targets), (name, targets)
    page = browser.new_page()
    page.goto((folder / "report" / "report.html").as_uri())
    page.click("text=checklist.html")
    assert page.title().startswith("Checklist")
    page.click("text=report.html")
    assert page.title().startswith("Evaluation")
    page.close()
