"""The report in a real browser: drawn, readable in light and dark, on a wide and on a narrow screen, asking for nothing.

Skipped where there is no Chromium; `make test-browser` installs Debian's and runs this.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from embedding.run.report.publish import make_report, write_report
from tests.support.made_output import SETTINGS, made_output
from tests.support.s3_server import S3Server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FIGURES = ["pace", "workers", "lengths", "plane", "cosines"]
READABLE = 4.5
"""Contrast that WCAG asks of text."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: make test-browser installs Debian's")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    made = made_output(str(folder / "out"))
    path = folder / "report.html"
    path.write_text(make_report(made.output, made.summary, SETTINGS, made.shards, model="some/model"))
    return path


def opened(browser: Browser, url: str, scheme: Literal["light", "dark"], width: int) -> tuple[Page, list[str], list[str]]:
    """The page at `url`, what it asks for, and what the browser's console has to say of it."""
    page = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}).new_page()
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    return page, requests, complaints


def pixels(png: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def colour(page: Page, selector: str, name: str) -> list[int]:
    value = page.eval_on_selector(selector, "(element, name) => getComputedStyle(element)[name]", name)
    return [int(number) for number in re.findall(r"\d+", value)[:3]]


def contrast(one: list[int], other: list[int]) -> float:
    """As WCAG 2 defines it."""
    light = []
    for channels in (one, other):
        linear = [value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in channels]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(light) / min(light)


@pytest.mark.parametrize("width", [1200, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_drawn(browser: Browser, report: Path, scheme: Literal["light", "dark"], width: int, tmp_path: Path) -> None:
    page, requests, complaints = opened(browser, report.as_uri(), scheme, width)
    assert requests == [report.as_uri()]
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    assert [figure.get_attribute("class") for figure in page.query_selector_all("svg")] == [f"figure {name}" for name in FIGURES]
    panel = colour(page, "figure", "backgroundColor")
    for name in FIGURES:
        figure = page.query_selector(f"svg.{name}")
        assert figure is not None
        box = figure.bounding_box()
        assert box is not None
        assert box["width"] > 0.75 * min(width, 600)
        assert box["height"] > 60
        distances = np.abs(pixels(figure.screenshot()).astype(int) - panel).sum(axis=-1)
        assert (distances > 100).sum() > 1000, name
    picture = pixels(page.screenshot(full_page=True, path=tmp_path / "report.png"))
    assert picture.shape[1] == width
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    assert (picture.mean() < 100) == (scheme == "dark")
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(browser: Browser, report: Path, scheme: Literal["light", "dark"]) -> None:
    page, _, _ = opened(browser, report.as_uri(), scheme, 1200)
    panel = colour(page, "figure", "backgroundColor")
    for selector in ("h1", "h1 b", "figcaption", "td", "th", "summary", ".legend li"):
        assert contrast(colour(page, selector, "color"), panel) >= READABLE, selector
    assert contrast(colour(page, "svg.lengths text", "fill"), panel) >= READABLE
    page.context.close()


def test_numbers_open_without_a_script_and_points_have_names(browser: Browser, report: Path) -> None:
    page, _, _ = opened(browser, report.as_uri(), "light", 1200)
    assert not page.is_visible("details table >> nth=0")
    page.click("summary >> nth=0")
    assert page.is_visible("details table >> nth=0")
    names = page.eval_on_selector_all("svg.plane use title", "titles => titles.map(title => title.textContent)")
    assert len(names) == 360
    assert all(re.fullmatch(r"id-\d-\d+ \(topic \d\)", name) for name in names)
    page.context.close()


def test_it_opens_from_s3(browser: Browser, s3: S3Server) -> None:
    made = made_output(s3.folder())
    write_report(made.output, made.summary, SETTINGS, made.shards, model="some/model")
    bucket, _, key = f"{made.output.url}/_control/runs/{made.summary.run}/report.html".removeprefix("s3://").partition("/")
    assert s3.client().head_object(Bucket=bucket, Key=key)["ContentType"] == "text/html; charset=utf-8"  # this server would guess, S3 not
    url = s3.client().generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})
    page, requests, complaints = opened(browser, url, "light", 1200)
    assert page.inner_text("h1").startswith("Complete.")
    assert (len(requests), complaints) == (1, [])
    page.context.close()
