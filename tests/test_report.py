"""The benchmark report in a real browser: complete, self-contained, readable in light and dark, nothing overlapping."""

from __future__ import annotations

import base64
import itertools
import re
import shutil
import sys

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from typer.testing import CliRunner

from vgg_fast.bench import host, peers, plots, report, roofline
from vgg_fast.bench.roofline import Ceilings
from vgg_fast.cli import app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NO_BROWSER = "no Chromium or no chromedriver here: apt-get install chromium chromium-driver"

CEILINGS = Ceilings({"fp32": 352.0, "bf16": 2500.0}, 26.0, "as somebody measured them")
MS = {"eager": 118, "channels_last": 97, "torch.compile": 94, "onnxruntime": 102, "openvino": 96, "vgg_fast": 55}


def row(problem, precision, batch, contestant, scale, gflop=None, **changes):
    ratio = MS["vgg_fast"] / MS[contestant]
    ours = contestant == peers.OURS
    return {
        "problem": problem,
        "dtype": "bfloat16" if precision == "bf16" else "float32",
        "precision": precision,
        "batch": batch,
        "contestant": contestant,
        "kernel": "amx_bf16" if ours else "",
        "median_ms_per_image": MS[contestant] * scale,
        "min_ms_per_image": MS[contestant] * scale * 0.95,
        "rounds": 9,
        "ratio_to_best_peer": 0.59 if ours else None,
        "ratio_of_ours": ratio,
        "ratio_low": ratio * 0.97,
        "ratio_high": ratio * 1.05,
        "relative_error": {"fp32": 1e-6, "fp32 high": 2e-5, "bf16": 6e-3}[precision] * (1 + 0.1 * len(contestant)),
        "gflop_per_image": gflop,
        "megabytes_per_image": None if gflop is None else 10.0,
        **changes,
    }


def rows():
    result = []
    for problem, batch in (("features 224", 1), ("features 224", 8), ("model 224", 1)):
        for precision, scale in (("fp32", 1.0), ("fp32 high", 0.6), ("bf16", 0.2)):
            names = [name for name in MS if not (name == "onnxruntime" and precision == "bf16")]
            result += [row(problem, precision, batch, name, scale) for name in names]
    for layer in peers.LAYERS:
        name = f"{layer.name}+pool" if layer.pool else layer.name
        for contestant in ("eager", "channels_last", "vgg_fast"):
            result.append(row(name, "fp32", 1, contestant, layer.gflop / 30, layer.gflop))
    return result


def results(**changes):
    reasons = [("onnxruntime", "features 224, bf16", "its CPU provider has no convolution in <bfloat16> & more")]
    fields = {"ceilings": CEILINGS, "left_out": reasons, "command": "python -m benchmarks.peers", **changes}
    return report.Results(fields.pop("rows", rows()), host.describe(), **fields)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip(NO_BROWSER)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def look(browser, path, scheme="light", width=1100):
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(path.as_uri())
    return browser


@pytest.fixture
def page(browser, tmp_path):
    path = tmp_path / "report.html"
    report.write(path, results())
    return look(browser, path)


def test_it_needs_nothing_but_itself(page):
    assert page.execute_script("return document.readyState") == "complete"
    assert page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    requests = re.findall(r'"method":"Network\.requestWillBeSent".*?"url":"(\w+):', str(page.get_log("performance")))
    assert "file" in requests
    assert not {"http", "https", "ws", "wss"} & set(requests)
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_every_number_is_in_a_table_and_every_plot_is_named(page):
    tables = page.execute_script("""
        return [...document.querySelectorAll('table')].map(t =>
          [...t.rows].map(r => [...r.cells].map(c => c.innerText)))""")
    times, layers, left_out, machine = tables
    assert len(times) == 1 + len([r for r in rows() if r["gflop_per_image"] is None])
    ours = next(line for line in times if line[0] == "features 224 · bf16 · batch 8" and "vgg-fast" in line[1])
    assert ours[1:4] == ["vgg-fast amx_bf16", "11.00", "10.45"]
    assert len(layers) == 1 + len(peers.LAYERS)
    assert left_out[1] == [
        "ONNX Runtime",
        "features 224, bf16",
        "its CPU provider has no convolution in <bfloat16> & more",
    ]
    assert {"cpu", "torch", "commit", "threads", "ceiling fp32", "command"} <= {line[0] for line in machine}
    labels = page.execute_script("return [...document.querySelectorAll('svg')].map(s => s.getAttribute('aria-label'))")
    assert len(labels) == 3
    assert all(labels)
    ids = page.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids)), "ids of several drawings must not collide"


def text_boxes(page):
    """Per drawing (text, left, top, right, bottom) of every text in it, and the drawing's own box first."""
    return page.execute_script("""
        const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
        return [...document.querySelectorAll('svg')].map(s => [['', ...box(s)],
          ...[...s.querySelectorAll('text')].map(t => [t.textContent.trim(), ...box(t)])])""")


def overlaps(a, b, slack=1.0):
    return min(a[3], b[3]) - max(a[1], b[1]) > slack and min(a[4], b[4]) - max(a[2], b[2]) > slack + 1.5


def test_labels_do_not_overlap_and_stay_inside(page):
    drawings = text_boxes(page)
    words = [text for drawing in drawings for text, *_ in drawing]
    for wanted in ("ms per image, median", "relative error (float64 = 0)", "PyTorch channels_last", "vgg-fast", "0.59"):
        assert wanted in words
    assert any("below 1: vgg-fast is faster" in word for word in words)
    for outer, *texts in drawings:
        assert len(texts) > 10
        for text in texts:
            assert outer[1] - 1 <= text[1], text
            assert text[3] <= outer[3] + 1, text
        for a, b in itertools.combinations(texts, 2):
            assert not overlaps(a, b), f"{a[0]!r} overlaps {b[0]!r}"


def test_bars_are_as_long_as_their_ratios(page):
    """The drawing itself, not only its labels: each bar's length over that of ratio 1 (the dashed line)."""
    bars = page.execute_script("""
        return [...document.querySelector('svg').querySelectorAll('g[id*=patch] path')]
          .map(p => p.getBoundingClientRect())
          .filter(r => r.width > 20 && r.height > 8 && r.height < 40).map(r => [r.left, r.right])""")
    line = page.execute_script("""
        return [...document.querySelector('svg').querySelectorAll('path')].filter(p => p.style.strokeDasharray &&
          p.getBoundingClientRect().height > 300).map(p => p.getBoundingClientRect().left)""")
    whole = [r for r in rows() if r["gflop_per_image"] is None and r["contestant"] != peers.OURS]
    assert len(bars) == len(whole)
    (one,) = line
    drawn = [(right - left) / (one - left) for left, right in bars]
    expected = [r["ratio_of_ours"] for r in whole]
    assert sorted(drawn) == pytest.approx(sorted(expected), abs=0.01)


def luminance(colour):
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_light_and_dark(browser, tmp_path, scheme):
    """WCAG 2: 4.5 for text, 3 for graphics, against the page."""
    report.write(tmp_path / "report.html", results())
    page = look(browser, tmp_path / "report.html", scheme)
    paper = luminance(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (paper > 0.9) == (scheme == "light")

    def contrast(colour):
        a, b = sorted((paper, luminance(colour)))
        return (b + 0.05) / (a + 0.05)

    texts = page.execute_script(
        "return [...new Set([...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill))]"
    )
    assert texts
    assert min(map(contrast, texts)) >= 4.5
    used = page.execute_script("""
        const probe = document.body.appendChild(document.createElement('i'));
        const html = document.documentElement.outerHTML;
        return [...new Set(html.match(/--c-[a-z]+/g))].map(v => {
          probe.style.color = `var(${v})`; return getComputedStyle(probe).color; })""")
    assert len(set(used)) == 7
    assert min(map(contrast, used)) >= 3


def test_a_narrow_window_scrolls_the_plots_and_not_the_page(browser, tmp_path):
    report.write(tmp_path / "report.html", results())
    page = look(browser, tmp_path / "report.html", width=420)
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    size = page.execute_script("const r = document.querySelector('svg text').getBoundingClientRect(); return r.height")
    assert size > 8, "labels must stay legible"


def test_the_checks_see_an_overlap(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text('<svg width="90" height="30"><text y="20">one</text><text y="22" x="3">two</text></svg>')
    (_, a, b), *_ = text_boxes(look(browser, path))
    assert overlaps(a, b)


def test_a_screenshot_is_not_blank(page):
    from io import BytesIO

    from PIL import Image

    shot = base64.b64decode(page.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])
    colours = Image.open(BytesIO(shot)).convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 50


# --- without a browser ----------------------------------------------------------------------------------------------


def test_ids_and_size_of_the_file(tmp_path):
    report.write(tmp_path / "report.html", results())
    text = (tmp_path / "report.html").read_text()
    assert len(text) < 400_000
    assert not re.findall(r'(?:src|href)="(?!#|data:,)', text), "nothing is loaded from elsewhere"
    assert "#0101" not in text, "a stand-in for a colour was left"


def test_failures_and_odd_names_are_shown_as_text(tmp_path):
    bad = [row("a<b>", "fp32", 1, name, 1.0) for name in ("eager", "vgg_fast")]
    text = report.page(results(rows=bad, failures=["features <script>: relative error"], ceilings=None))
    assert "a&lt;b&gt;" in text
    assert "features &lt;script&gt;" in text
    assert "<script" not in text


def test_threads_and_batches_have_a_table():
    def at(threads, batch, ms):
        changes = {"threads": threads, "median_ms_per_image": ms}
        return row("scaling 224", "fp32", batch, peers.OURS, 1.0, **changes)

    html = report.page(results(rows=[at(1, 1, 90.0), at(2, 1, 50.0), at(2, 8, 45.0)]))
    table = html[html.index("<h2>Threads and batches</h2>") :].partition("</section>")[0]
    assert re.findall(r"<td>([^<]*)</td>", table) == ["vgg-fast", "1.80", "50.00", "45.00", "0.900"]
    assert "Threads and batches" not in report.page(results())


def test_nothing_measured_is_still_a_page():
    text = report.page(results(rows=[], failures=["all of it"]))
    assert "all of it" in text
    assert "<svg" not in text


def test_slower_than_a_peer_and_equal_times_can_be_drawn():
    slow = {"ratio_of_ours": 3.1, "ratio_low": 3.0, "ratio_high": 3.3, "relative_error": 0.0}
    both = [row("features 32", "fp32", 1, name, 1.0, median_ms_per_image=5.0, **slow) for name in ("eager", "vgg_fast")]
    text = report.page(results(rows=both))
    assert text.count("<svg") == 2
    assert ">3.10<" in text


def test_ceilings():
    measured = roofline.measure_ceilings(size=128, copied_mb=4, repeats=2)
    assert measured.gflops["fp32"] > 0.1
    assert measured.gbytes > 0.1
    assert "128" in measured.how
    # 10 GFLOP at 100 GFLOP/s are 100 ms; 5 MB at 10 GB/s are 0.5 ms; bf16 slower than fp32 is no unit of its own.
    ceilings = Ceilings({"fp32": 100.0, "bf16": 2.0}, 10.0, "")
    assert ceilings.floor_ms("fp32", 10, 5) == 100
    assert ceilings.floor_ms("bf16", 10, 5) == 100
    assert ceilings.floor_ms("fp32 high", 0.001, 5) == 0.5
    with pytest.raises(ValueError, match="repeats=0"):
        roofline.measure_ceilings(repeats=0)


# --- vgg-fast bench --report ----------------------------------------------------------------------------------------


def test_bench_writes_the_report(tmp_path):
    path = tmp_path / "bench.html"
    options = ["bench", "--size", "32", "--rounds", "2", "--dtype", "fp32", "--report", str(path)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert "features 32" in done.stdout
    text = path.read_text()
    assert "features 32 · fp32 · batch 1" in text
    assert "ceiling fp32" in text


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plots.PlotsUnavailable, match=r"pip install 'vgg-fast\[peers\]'"):
        report.write(tmp_path / "report.html", results())
    done = CliRunner().invoke(app, ["bench", "--report", str(tmp_path / "bench.html")])
    assert done.exit_code == 2
    assert "vgg-fast[peers]" in done.stderr
