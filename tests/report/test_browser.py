"""report.html in a real browser: at desktop and phone width, light and dark, on paper, with hostile texts.

Needs Chromium (`make browser` installs it on Debian); CI does that, elsewhere the tests are skipped without it.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlprune.report.html import render_html
from vlprune.report.schema import validate_report


sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: make browser installs it on Debian")

DESKTOP, PHONE = 1280, 390  # CSS pixels
LONG = "a-name-without-any-place-to-break-" * 6
Open = Callable[..., Any]

# What reaches over the right edge, though nothing around it scrolls.
OVERFLOW = """() => [...document.querySelectorAll("body *")]
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .filter(e => !e.closest(".scroll, pre, svg, .unseen") && e.checkVisibility())
  .map(e => e.outerHTML.slice(0, 100))"""

# Texts whose contrast to the nearest background is below 4.5 (WCAG 2.2, 1.4.3).
FAINT = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility()) continue;
    const style = getComputedStyle(e), ink = e.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(rgb(ink)), light(behind(e))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found.push(`${contrast.toFixed(2)} ${e.outerHTML.slice(0, 100)}`);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield running
        running.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Open a report: opened(report, width, scheme) -> page; it logs no error, asks for nothing, opens no dialog."""
    contexts, said = [], []

    def open_page(report: dict[str, Any], width: int = DESKTOP, scheme: str = "light") -> Any:
        for name in ("vqa/0", "retrieval/1", "retrieval/2"):
            path = tmp_path / "samples" / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (160, 90), (200, 30, 30)).save(path)
        (tmp_path / "recipe.yaml").write_text(f"model: blip-tiny\ndata: /data/{LONG}.json\n")
        file = tmp_path / "report.html"
        file.write_text(render_html(validate_report(report), tmp_path), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: said.append(request.url) if wanted(request.url) else None)
        page.goto(file.as_uri())
        page.evaluate("for (const e of document.querySelectorAll('details')) e.open = true")
        page.said = said
        return page

    def wanted(url: str) -> bool:
        return not url.startswith("data:") and not url.endswith("report.html")

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_the_page_fits_and_is_readable(opened: Open, rich: dict[str, Any], width: int, scheme: str) -> None:
    page = opened(rich, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate(OVERFLOW) == []
    assert page.evaluate(FAINT) == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) > 384) == (scheme == "light")  # so the style sheet was let in
    assert page.evaluate("[...document.images].map(i => i.naturalWidth)") == [160] * 4
    for text in ("Compression of blip-tiny", "At a glance", "95.0 [93.0, 97.0]", "what color is it?", "30 % right"):
        assert page.get_by_text(text).first.is_visible(), text


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_hostile_and_long_texts(opened: Open, rich: dict[str, Any], width: int) -> None:
    attack = "</style></script><script>alert(1)</script><img src=x onerror=alert(1)><svg onload=alert(1)>" + LONG
    for key in ("name", "family", "checkpoint"):
        rich["model"][key] = attack
    for row in rich["variants"]:
        row["id"] = f"{LONG}{row['id']}"
        row["method"] = row["method"] and attack
        layers = row["sparsity"]["per_layer"]
        row["sparsity"]["per_layer"] = {f"{LONG}{attack}.{name}": share for name, share in layers.items()}
    for row in (
        *rich["metrics"],
        *rich["graphs"],
        *rich["throughput"],
        *(o for s in rich["samples"] for o in s["outputs"]),
    ):
        row["variant"] = f"{LONG}{row['variant']}"
    for row in (*rich["metrics"], *rich["graphs"], *rich["throughput"], *rich["samples"]):
        row["task"] = attack
    for row in (*rich["graphs"], *rich["throughput"]):
        row["graph"] = attack
    for row in rich["samples"]:
        row |= {"dataset": attack, "question": attack, "expected": [attack]}
        row["outputs"][0]["text"] = attack
    rich["environment"]["cpu"] = attack
    page = opened(rich, width)
    assert page.evaluate(OVERFLOW) == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate("document.scripts.length") == 0
    assert page.title() == f"Compression of {attack}"


def test_the_policy_holds(opened: Open, rich: dict[str, Any]) -> None:
    """Were something to slip through the escaping, the browser would neither run nor load it."""
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    page = opened(rich)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.evaluate(
            """address => {
              document.body.insertAdjacentHTML("beforeend", `<p id=styled style="color: red"></p>
                <img src="${address}/x.png"><iframe src="${address}"></iframe><img src=x onerror="window.ran = 1">`);
              const script = document.createElement("script");
              script.textContent = "window.ran = 1";
              document.body.append(script);
              fetch(address).catch(() => null);
            }""",
            f"http://127.0.0.1:{server.server_port}",
        )
        page.wait_for_timeout(300)
        server.shutdown()
    assert asked == [] and page.evaluate("window.ran") is None
    assert page.evaluate("getComputedStyle(document.querySelector('#styled')).color") != "rgb(255, 0, 0)"
    assert sum("Content Security Policy" in text for text in page.said) >= 5
    page.said.clear()


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_screen_readers_and_keyboards(opened: Open, rich: dict[str, Any], width: int) -> None:
    page = opened(rich, width)
    # Tables stay tables where they are laid out otherwise.
    table = page.get_by_role("table", name="vqa: accuracy")
    assert table.get_by_role("row").count() == 1 + 7 and table.get_by_role("columnheader").count() == 4
    assert table.get_by_role("img", name="95.0 [93.0, 97.0]").count() == 1
    assert page.evaluate("[...document.images].every(i => i.alt)")
    assert page.evaluate(
        "[...document.querySelectorAll('table')].every(t => t.caption && t.caption.textContent.trim())"
    )
    shown = "[...document.querySelectorAll('svg')].filter(e => !e.parentElement.closest('svg'))"
    assert page.evaluate(f"{shown}.every(e => e.ariaHidden || (e.role === 'img' && e.ariaLabel))")
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(e => +e.tagName[1])")
    assert levels[0] == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Accuracy"
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('#accuracy').getBoundingClientRect().top") < 450
    summary = page.locator("summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('details').open") is False


def test_paper_shows_what_is_folded(opened: Open, rich: dict[str, Any]) -> None:
    page = opened(rich)
    page.evaluate("for (const e of document.querySelectorAll('details')) e.open = false")
    table = page.get_by_role("region", name="ONNX graphs").or_(page.locator("[aria-label='ONNX graphs']")).first
    assert not table.is_visible()
    page.emulate_media(media="print")
    assert table.is_visible()
    assert page.pdf().startswith(b"%PDF")


def test_names_leave_room_for_figures_on_a_phone(opened: Open, rich: dict[str, Any]) -> None:
    for row in rich["graphs"]:
        row["file"] = f"onnx/{'a-long-name/' * 6}graph.onnx"
    page = opened(rich, PHONE)
    page.evaluate("for (const e of document.querySelectorAll('details')) e.open = true")
    names = "[...document.querySelectorAll('.sheet tbody th')].map(e => e.getBoundingClientRect().width)"
    assert 0 < max(page.evaluate(names)) < PHONE / 2
