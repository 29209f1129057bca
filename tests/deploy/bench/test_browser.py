"""The page in a real browser: no console message, nothing that touches, runs over or cannot be read.

In the light and the dark scheme, in print, and on a narrow screen. UTUNE_SCREENSHOTS names a folder for pictures.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from utune_deploy.deploy.bench.views.page import render_html, write_sweep_html
from utune_deploy.deploy.load.page import write_html as write_load_html

RESULTS = Path(__file__).resolve().parents[3] / "bench" / "results"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"),
]

LOOKS = {
    "light": {"media": "screen", "scheme": "light", "width": 1100},
    "dark": {"media": "screen", "scheme": "dark", "width": 1100},
    "print": {"media": "print", "scheme": "light", "width": 720},
    "narrow": {"media": "screen", "scheme": "dark", "width": 390},
}

# What is folded away: how many there are, and how many can be seen.
FOLDS = r"""
(() => {
  const folds = [...document.querySelectorAll("details > div")];
  return [folds.length, folds.filter((fold) => fold.checkVisibility({contentVisibilityAuto: true})).length];
})()
"""

# What can be seen of the second subject, and of the third: series in charts, rows of tables; before and after the second
# is left out.
SEEN = r"""
(() => {
  const seen = (index) => [
    [...document.querySelectorAll(`.filtered g.s${index}`)].filter((g) => g.getClientRects().length).length,
    [...document.querySelectorAll(`.filtered tr:has(.s${index})`)].filter((row) => row.offsetHeight > 2).length,
  ];
  const before = [seen(1), seen(2)];
  document.querySelector("input.show2").click();
  return [before, [seen(1), seen(2)]];
})()
"""

# Every problem of the page that geometry and colours show, in words; on a screen with all that is folded away.
LOOK = r"""
(() => {
  const found = [];
  if (matchMedia("screen").matches) for (const fold of document.querySelectorAll("details")) fold.open = true;
  const box = (element) => element.getBoundingClientRect();
  const say = (element) => element.textContent.trim().slice(0, 40);
  const channels = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour[3] > 0) return colour;
    }
    return [255, 255, 255, 1];
  };
  if (document.documentElement.scrollWidth > innerWidth) found.push("the page is wider than the screen");
  for (const chart of document.querySelectorAll("svg.chart")) {
    const texts = [...chart.querySelectorAll("text")];
    const frame = box(chart);
    texts.forEach((text, index) => {
      const a = box(text);
      if (a.left < frame.left - 2 || a.right > frame.right + 2 || a.top < frame.top - 2 || a.bottom > frame.bottom + 2)
        found.push(`"${say(text)}" leaves its chart`);
      for (const other of texts.slice(index + 1)) {
        const b = box(other);
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > -3 && high > 4) found.push(`"${say(text)}" and "${say(other)}" touch`);
      }
    });
  }
  for (const element of document.querySelectorAll("h1, h2, p, li, dt, dd, th, td, span, a, pre, strong, b, text")) {
    if (!say(element)) continue;
    const style = getComputedStyle(element);
    const ink = luminance(channels(element.tagName === "text" ? style.fill : style.color));
    const paper = luminance(behind(element));
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (contrast < 4.5) found.push(`"${say(element)}" has a contrast of ${contrast.toFixed(1)}`);
  }
  for (const cell of document.querySelectorAll("main > header, main > section > p, dl, li")) {
    if (box(cell).right > innerWidth + 1) found.push(`"${say(cell)}" runs over the edge`);
  }
  return found;
})()
"""


class Tab:
    """One page of a browser, over the DevTools protocol."""

    def __init__(self, socket):
        self.socket, self.number, self.said = socket, 0, []

    async def ask(self, method, **parameters):
        """The result of a command; what the console says meanwhile is kept."""
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.note(message)

    def note(self, message):
        """Keep what stands in a console: errors, warnings, violations of the policy."""
        if message.get("method") == "Log.entryAdded":
            self.said.append(message["params"]["entry"]["text"])
        elif message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.said.append(str(message["params"]))

    async def open(self, url):
        """Load a page and wait until it is there."""
        await self.ask("Page.navigate", url=url)
        while True:
            message = await self.socket.receive_json(timeout=60)
            self.note(message)
            if message.get("method") == "Page.loadEventFired":
                return


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """The address of a headless browser."""
    profile = tmp_path_factory.mktemp("profile")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--disable-dev-shm-usage", "--disable-background-networking", "--remote-debugging-port=0",
        f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = profile / "DevToolsActivePort"
        until = time.monotonic() + 60
        while not (port.is_file() and port.read_text().count("\n")):
            assert process.poll() is None, "the browser ended"
            assert time.monotonic() < until, "the browser does not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port.read_text().splitlines()[0]}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def look(browser):
    """`look(file, look, expression=LOOK, at="") -> (console, its value, png)`; `at` is a place in the page."""

    async def look(file, expression, at, media, scheme, width):
        async with aiohttp.ClientSession() as session:
            async with session.put(f"{browser}/json/new?about:blank") as answer:
                target = await answer.json()
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Log", "Runtime"):
                    await tab.ask(f"{domain}.enable")
                await tab.ask(
                    "Emulation.setEmulatedMedia", media=media,
                    features=[{"name": "prefers-color-scheme", "value": scheme}],
                )  # fmt: skip
                await tab.ask(
                    "Emulation.setDeviceMetricsOverride",
                    width=width, height=900, deviceScaleFactor=1, mobile=False,
                )  # fmt: skip
                await tab.open(file.as_uri() + at)
                answer = await tab.ask(
                    "Runtime.evaluate", expression=expression, returnByValue=True
                )
                value = answer["result"]["value"]
                shot = await tab.ask("Page.captureScreenshot", captureBeyondViewport=True)
            await session.get(f"{browser}/json/close/{target['id']}")
        return tab.said, value, base64.b64decode(shot["data"])

    return lambda file, name, expression=LOOK, at="": asyncio.run(
        look(file, expression, at, **LOOKS[name])
    )


@pytest.fixture(scope="session")
def crowded():
    """Makes a report that has too much of everything: names, subjects, cases, digits."""

    def crowd(report):
        names = ["backbone only", "a bundle with a very long name indeed, every task", *"abcdef"]
        results = [
            tuple(
                replace(case.results[min(index, 1)], subject=name)
                for index, name in enumerate(names)
            )
            for case in report.cases
        ]
        subjects = tuple(replace(report.subjects[min(i, 1)], name=n) for i, n in enumerate(names))
        cases = tuple(
            replace(case, case=replace(case.case, batch=batch, mix=mix), results=results[k % 5])
            for mix in ("one", "uniform", "zipf", "hot")
            for k, (batch, case) in enumerate(
                zip((1, 2, 3, 4, 6, 8, 16, 128), report.cases * 2, strict=False)
            )
        )
        return replace(report, subjects=subjects, cases=cases)

    return crowd


def keep(name, look, png):
    folder = os.environ.get("UTUNE_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}-{look}.png").write_bytes(png)


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("page", ["stored", "crowded", "sweep", "full", "load", "load at rates"])
def test_the_page_is_readable_and_the_console_silent(
    look, report, load_report, full, crowded, tmp_path, page, name
):
    file = tmp_path / "report.html"
    if page == "stored":
        file = RESULTS / "report" / "report.html"
    elif page == "crowded":
        file.write_text(render_html(crowded(report)), encoding="utf-8")
    elif page == "full":
        file.write_text(render_html(full), encoding="utf-8")
    elif page == "load":
        write_load_html(load_report("closed", (1, 2, 4, 8, 16, 64)), file)
    elif page == "load at rates":
        write_load_html(load_report("poisson", (5, 10, 20, 40, 60, 80, 1000, 1200)), file)
    else:
        write_sweep_html({"size of the bank": report, "one task": report}, "nightly", file)
    console, problems, png = look(file, name)
    keep(page, name, png)
    assert console == []
    assert problems == []
    assert png.startswith(b"\x89PNG")


def test_comparisons_are_folded_and_open_for_a_link_and_in_print(look, report, tmp_path):
    file = tmp_path / "report.html"
    write_sweep_html({"one": report, "two": report, "three": report}, "nightly", file)
    for name, at, seen in (
        ("light", "", 0), ("narrow", "", 0), ("light", "#comparison-2", 1), ("print", "", 3)
    ):  # fmt: skip
        console, folds, png = look(file, name, FOLDS, at)
        keep(f"folded{at.strip('#')}", name, png)
        assert folds == [3, seen]
        assert console == []


def test_what_is_wrong_with_a_page_is_found(look, report, tmp_path):
    """The checks themselves: a script that the policy forbids, faint ink, labels on one another."""
    html = render_html(report)
    file = tmp_path / "bad.html"
    end = "</svg>"
    more = '<text x="400" y="300">some words</text><text x="410" y="300">other words</text></svg>'
    file.write_text(
        html.replace(end, more, 1).replace("--soft: #59616b", "--soft: #d9d9d9")
        .replace("</body>", "<script>1</script></body>"),
        encoding="utf-8",
    )  # fmt: skip
    console, problems, _ = look(file, "light")
    assert any("Content Security Policy" in said for said in console)
    assert '"some words" and "other words" touch' in problems
    assert any("contrast" in problem for problem in problems)


def test_subjects_can_be_left_out(look, report, crowded, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(render_html(crowded(report)), encoding="utf-8")
    console, (before, after), png = look(file, "light", SEEN)
    keep("filtered", "light", png)
    assert console == []
    assert all(count > 0 for counts in before for count in counts)
    assert after == [before[0], [0, 0]]
