"""The web page in a browser, over the real API and a small bundle: what a doctor does with it."""

import csv
import json
import re
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import uvicorn
from axe_playwright_python.base import AXE_SCRIPT

from bt_core.errors import REASONS
from bt_core.scans.phantom import encode_picture, phantom_slice
from serve.api import build_api
from serve.keys import add_key
from serve.service import Service
from serve.settings import ServeSettings
from tests.hosted import tiny_hosted
from tests.scan_files import dicom_object, nifti

pytestmark = pytest.mark.integration

HEADS = [phantom_slice(name, 1, 96) for name in ("glioma", "meningioma", "pituitary", "no_tumor")]
PNG = encode_picture(HEADS[0], ".png")
VOLUME = nifti(np.stack([HEADS[1]] * 5, axis=2))
SIZES = {"desk": 1280, "phone": 360}


def upload(name, content):
    return {"name": name, "mimeType": "application/octet-stream", "buffer": content}


@contextmanager
def hosted(app):
    """Answer on a port of this machine, and return the address."""
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_hosted(tmp_path_factory, 32, 48)


@pytest.fixture(scope="module")
def api(bundle):
    settings = ServeSettings(bundle="unused", max_files=4, max_body_mib=2)
    service = Service(settings, bundle.hosted)
    yield build_api(service)
    service.close()


@pytest.fixture(scope="module")
def bodies():
    """What the server was sent."""
    return []


@pytest.fixture(scope="module")
def address(api, bodies):
    async def heard(scope, receive, send):
        async def listen():
            message = await receive()
            bodies.append(message.get("body", b""))
            return message

        await api(scope, listen, send)

    with hosted(heard) as address:
        yield address


@pytest.fixture(scope="module")
def locked(bundle, tmp_path_factory):
    """The address of one that wants keys, and a key."""
    keys = str(tmp_path_factory.mktemp("keys") / "keys.json")
    key = add_key(keys, "doctor", ["predict", "explain"])
    service = Service(ServeSettings(bundle="unused", keys=keys), bundle.hosted)
    with hosted(build_api(service)) as address:
        yield address, key
    service.close()


class Visit:
    """The page in a tab of its own, and what was heard meanwhile."""

    def __init__(self, browser, address, size="desk", scheme="light"):
        self.address, self.heard, self.requests = address, [], []
        self.context = browser.new_context(
            viewport={"width": SIZES[size], "height": 800}, color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)  # other work may leave the browser little time
        self.page.add_init_script(
            "document.addEventListener('securitypolicyviolation', "
            "event => console.error('policy: ' + event.violatedDirective))"
        )
        self.page.on("console", lambda m: self.heard.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda error: self.heard.append(f"error: {error}"))
        self.page.on("request", lambda r: self.requests.append((r.method, r.url)))
        self.page.goto(address)

    def send(self, *files):
        """Choose files, and wait until none of them waits any more."""
        self.page.set_input_files("#files", [upload(*file) for file in files])
        self.done()

    def done(self):
        self.page.wait_for_selector("#status:text('Done.')")
        assert self.page.locator(".card[data-decision=waiting]").count() == 0

    def card(self, name):
        return self.page.locator(".card").filter(has=self.page.get_by_text(name, exact=True))

    def explain(self, name):
        self.card(name).get_by_role("button", name="Show heat map").click()
        self.card(name).get_by_label("Heat map opacity").wait_for()

    def saved(self, button, folder):
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name=button).click()
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def requests_to(self, path):
        return [url for method, url in self.requests if method == "POST" and path in url]

    def close(self):
        kept = self.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
        assert kept == [0, 0, ""], "nothing is stored"
        assert self.context.cookies() == []
        own = (self.address, "data:", f"blob:{self.address}")
        assert [url for _, url in self.requests if not url.startswith(own)] == []
        # The browser itself reports answers of 4xx and 5xx, which some tests ask for.
        refused = re.compile(r"error: Failed to load resource: .* status of (401|415|422|503) ")
        assert [text for text in self.heard if not refused.match(text)] == []
        self.context.close()


@pytest.fixture
def visit(browser, address):
    visit = Visit(browser, address)
    yield visit
    visit.close()


def test_scans_of_several_kinds_are_answered_and_a_bad_one_costs_no_other(visit, bundle):
    visit.send(("one.png", PNG), ("two.dcm", dicom_object(HEADS[2])), ("bad.txt", b"no scan"))
    for name in ("one.png", "two.dcm"):
        card = visit.card(name)
        assert card.locator(".bars li").count() == 4
        names = card.locator(".bars .name").all_inner_texts()
        assert names == ["Glioma", "Meningioma", "No tumor", "Pituitary"]
        likeliest = card.locator(".bars .likeliest")
        assert likeliest.locator(".name").inner_text() == card.locator(".label").inner_text()
        number = likeliest.locator(".number").inner_text()
        assert card.locator(".confidence").inner_text() == f"{number} calibrated confidence"
        assert card.locator(".badge").inner_text() in ("Auto", "Review")
        size = card.locator(".frame img").evaluate("i => [i.naturalWidth, i.naturalHeight]")
        assert size == [96, 96]
        assert card.locator(".frame img").get_attribute("alt") == f"Slice of {name}"
    bad = visit.card("bad.txt")
    assert bad.locator(".badge").inner_text() == "Not classified"
    words = REASONS["unsupported_type"]
    assert bad.locator(".why").inner_text().lower().startswith(words.lower())
    assert "1 not classified" in visit.page.locator("#status").inner_text()
    assert len(visit.requests_to("/v1/predictions")) == 1
    assert not visit.requests_to("/v1/explanations"), "on demand only"


def test_the_numbers_are_those_of_the_api(visit, address):
    import requests

    visit.send(("one.png", PNG))
    (answer,) = requests.post(f"{address}/v1/predictions", data=PNG, timeout=60).json()["results"]
    card = visit.card("one.png")
    shown = card.locator(".bars .number").all_inner_texts()
    assert shown == [f"{100 * p:.1f} %" for p in answer["probabilities"].values()]
    why = f"A person should look: {REASONS[answer['reason']]}."
    if len(answer["prediction_set"]) > 1:
        left = ", ".join(name.replace("_", " ").capitalize() for name in answer["prediction_set"])
        why += f" Not ruled out: {left}."
    assert card.locator(".why").inner_text() == why


def test_a_volume_says_which_slice_it_is_about(visit):
    visit.send(("volume.nii", VOLUME))
    card = visit.card("volume.nii")
    assert card.locator("figcaption").inner_text() == "Slice 3 of 5"
    assert card.locator(".badge").inner_text() == "Review"


def test_a_bad_file_alone_says_why(visit):
    visit.send(("empty.png", b""))
    assert visit.card("empty.png").locator(".badge").inner_text() == "Not read"
    assert "no bytes" in visit.card("empty.png").locator(".why").inner_text()
    visit.send(("large.png", PNG + bytes(3 * 1024**2)))
    assert "the server takes 2.0 MiB" in visit.card("large.png").locator(".why").inner_text()


def test_many_scans_go_in_several_requests(visit):
    visit.send(*((f"{i}.png", encode_picture(HEADS[i % 4], ".png")) for i in range(6)))
    assert visit.page.locator(".card").count() == 6
    assert len(visit.requests_to("/v1/predictions")) == 2


def test_a_heat_map_lies_over_the_picture_and_fades(visit):
    visit.send(("one.png", PNG))
    visit.explain("one.png")
    card = visit.card("one.png")
    drawn = card.locator(".map").evaluate(
        "c => [c.width, c.height, "
        "Math.max(...c.getContext('2d').getImageData(0, 0, c.width, c.height).data)]"
    )
    assert drawn == [96, 96, 255]
    image, canvas = (card.locator(own).bounding_box() for own in (".frame img", ".map"))
    assert image == canvas
    slider = card.get_by_label("Heat map opacity")
    assert card.locator(".map").evaluate("c => getComputedStyle(c).opacity") == "0.65"
    slider.fill("20")
    assert card.locator(".map").evaluate("c => getComputedStyle(c).opacity") == "0.2"
    assert "Grad cam of m0, m1" in card.locator(".method").inner_text()
    assert card.locator(".votes tbody tr").count() == 2
    assert card.locator(".votes tbody tr").first.locator("td").count() == 4


def test_an_explainer_out_of_reach_can_be_asked_again(visit, bundle):
    visit.send(("one.png", PNG))
    bundle.is_there = False
    try:
        card = visit.card("one.png")
        card.get_by_role("button", name="Show heat map").click()
        card.locator(".explain-status:text('The server is busy')").wait_for()
    finally:
        bundle.is_there = True
    visit.explain("one.png")


def test_overload_is_said_and_nothing_is_lost(visit, bundle):
    bundle.is_there = False
    try:
        visit.page.set_input_files("#files", [upload("one.png", PNG), upload("two.png", PNG)])
        alert = visit.page.get_by_role("alert")
        alert.wait_for()
        assert "The server is busy" in alert.inner_text()
        assert "in about 1 s" in alert.inner_text()
        assert "2 scans waiting" in visit.page.locator("#status").inner_text()
    finally:
        bundle.is_there = True
    visit.page.get_by_role("button", name="Try again").click()
    visit.done()
    assert not alert.is_visible()
    assert visit.page.locator(".card").count() == 2


def test_a_key_is_asked_for_and_kept_in_memory(browser, locked):
    address, right = locked
    visit = Visit(browser, address)
    field = visit.page.get_by_label("Key", exact=True)
    field.wait_for()
    assert visit.page.evaluate("document.activeElement.id") == "key-field"
    visit.page.set_input_files("#files", [upload("one.png", PNG)])
    for key in ("wrong", right):
        field.fill(key)
        with visit.page.expect_response(lambda answer: "/v1/" in answer.url):
            visit.page.get_by_role("button", name="Use this key").click()
        if key == "wrong":
            visit.page.get_by_text("The key was not accepted").wait_for()
            assert field.input_value() == ""
    visit.done()
    assert not field.is_visible()
    visit.explain("one.png")
    assert right not in visit.page.content()
    visit.page.reload()
    field.wait_for()
    visit.close()


def test_results_are_saved_as_csv_and_json(visit, tmp_path):
    visit.send(("=1+2.png", PNG), ('a "b", c.png', encode_picture(HEADS[1], ".png")), ("x", b""))
    visit.explain("=1+2.png")
    content = visit.saved("Download CSV", tmp_path).read_bytes()
    assert content.startswith("\ufeff".encode())
    rows = list(csv.DictReader(content.decode("utf-8-sig").splitlines()))
    assert [row["file"] for row in rows] == ["'=1+2.png", 'a "b", c.png', "x"]
    for row in rows[:2]:
        shares = [float(text) for name, text in row.items() if name.startswith("prob_")]
        assert sum(shares) == pytest.approx(1)
        assert max(shares) == float(row["confidence"])
        assert row["reason_in_words"]
    assert (rows[2]["reason"], rows[2]["predicted_label"]) == ("empty_file", "")
    saved = json.loads(visit.saved("Download JSON", tmp_path).read_text())
    assert saved["notice"] == "For research. Not a medical device."
    assert [own["file"] for own in saved["results"]] == ["=1+2.png", 'a "b", c.png', "x"]
    assert saved["results"][0]["members"].keys() == {"m0", "m1"}
    assert "picture" not in saved["results"][0]
    assert float(rows[0]["confidence"]) == saved["results"][0]["confidence"]


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1", "'=1"), ("+1", "'+1"), ("-1", "'-1"), ("@x", "'@x"), ("\t=1", "'\t=1"),
        (" =1", "' =1"), ("a=1", "a=1"), ('a"b', '"a""b"'), ("=1,2", '"\'=1,2"'), ("", ""),
    ],
)  # fmt: skip
def test_a_cell_is_never_a_formula(visit, text, cell):
    script = "async text => (await import('./static/download.js')).cell(text)"
    assert visit.page.evaluate(script, text) == cell
    assert visit.page.evaluate(script, -0.5) == "-0.5", "a number is one"


def test_names_are_text_and_never_markup(visit):
    name = "<img src=x onerror=alert(1)>.png"
    visit.send((name, PNG), (f"{name}.txt", b"no scan"))
    assert visit.page.locator(".file").all_inner_texts() == [name, f"{name}.txt"]
    assert visit.page.locator("img[src=x]").count() == 0
    assert [url for _, url in visit.requests if url.endswith("/x")] == []


def test_names_of_files_stay_in_the_browser(visit, bodies):
    bodies.clear()
    visit.send(("DOE^JOHN.png", PNG))
    visit.explain("DOE^JOHN.png")
    assert b"".join(bodies).count(b'"scan0.png"') == 2
    assert b"DOE" not in b"".join(bodies)


def test_a_drop_is_taken_anywhere_on_the_page(visit):
    visit.page.evaluate(
        """bytes => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png"));
          const options = {dataTransfer: transfer, bubbles: true, cancelable: true};
          document.body.dispatchEvent(new DragEvent("drop", options));
        }""",
        list(PNG),
    )
    visit.done()
    assert visit.card("dropped.png").locator(".label").inner_text()


def test_the_history_is_this_tabs(visit):
    visit.send(("first.png", PNG))
    visit.send(("second.png", PNG), ("third.png", PNG))
    batches = visit.page.locator(".batch")
    assert batches.count() == 2
    assert batches.nth(0).evaluate("b => b.open")
    assert not batches.nth(1).evaluate("b => b.open")
    assert "2 scans" in batches.nth(0).locator("h3").inner_text()
    assert not visit.card("first.png").is_visible()
    batches.nth(1).locator("summary").first.click()
    assert visit.card("first.png").is_visible()
    visit.page.get_by_role("button", name="Clear all").click()
    assert visit.page.locator(".card").count() == 0
    assert not visit.page.get_by_role("button", name="Download CSV").is_visible()
    visit.send(("fourth.png", PNG))
    visit.page.reload()
    visit.page.wait_for_selector("#model:not(:empty)")
    assert visit.page.locator(".card").count() == 0


def test_all_can_be_done_by_keyboard(visit, tmp_path):
    page = visit.page
    choosers = []
    page.on(
        "filechooser", lambda chooser: choosers.append(chooser)
    )  # early, since the browser has to be told of it
    page.wait_for_selector("#model:not(:empty)")

    def tab_to(selector):
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                assert page.evaluate(
                    "() => { const own = document.activeElement;"
                    "const shown = own.id === 'files' ? own.parentElement : own;"
                    "return getComputedStyle(shown).outlineStyle; }"
                ) not in ("none", ""), f"the focus is seen on {selector}"
                return
        pytest.fail(f"{selector} is not reached")

    tab_to("#files")
    page.keyboard.press("Enter")
    deadline = time.monotonic() + 60
    while not choosers and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    choosers[0].set_files([upload("one.png", PNG)])
    visit.done()
    for selector in ("#csv", "#json", "#clear", ".batch > summary"):
        tab_to(selector)
    tab_to(".show-map")
    page.keyboard.press("Enter")
    visit.card("one.png").get_by_label("Heat map opacity").wait_for()
    page.wait_for_function("document.activeElement.type === 'range'")
    page.keyboard.press("ArrowLeft")
    assert visit.card("one.png").locator(".map").evaluate("c => c.style.opacity") == "0.6"
    tab_to(".more > summary")
    page.keyboard.press("Enter")
    assert visit.card("one.png").get_by_text("Members that answered").is_visible()


def test_the_page_says_what_it_is_not_and_its_policy_is_strict(visit):
    assert "For research. Not a medical device." in visit.page.locator("header").inner_text()
    import requests

    for path in ("/", "/static/main.js", "/static/style.css", "/static/data.json"):
        headers = requests.get(visit.address + path, timeout=60).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    for name in ("../settings.py", "%2e%2e%2fsettings.py", "none.js", "__pycache__"):
        assert requests.get(f"{visit.address}/static/{name}", timeout=60).status_code == 404


def findings(page):
    """Return what axe finds that keeps people out."""
    page.evaluate(AXE_SCRIPT)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        (own["id"], own["impact"], [node["html"] for node in own["nodes"]])
        for own in found
        if own["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing_serious(browser, address, bundle, size, scheme):
    visit = Visit(browser, address, size, scheme)
    page = visit.page
    page.wait_for_selector("#model:not(:empty)")

    def check(state):
        assert findings(page) == [], state
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= SIZES[size], f"{state}: no need to scroll sideways"

    check("before")
    visit.send(("one.png", PNG), (f"{'long-name-' * 12}.png", PNG), ("bad.txt", b"no scan"))
    visit.explain("one.png")
    visit.card("one.png").locator(".more summary").click()
    check("results")
    bundle.is_there = False
    try:
        page.set_input_files("#files", [upload("waiting.png", PNG)])
        page.get_by_role("alert").wait_for()
        check("overload")
    finally:
        bundle.is_there = True
    visit.close()


def test_axe_finds_nothing_serious_where_a_key_is_asked_for(browser, locked):
    visit = Visit(browser, locked[0], "phone", "dark")
    visit.page.get_by_label("Key", exact=True).wait_for()
    assert findings(visit.page) == []
    visit.close()
