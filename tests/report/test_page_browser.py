"""The report page in a real browser: headless Chromium, driven by playwright. Skipped where either is missing."""

import json
import math
import os
import shutil
import time

import pytest

from bitnet.report.page import write_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]

EVALUATION = {"text": "joined", "text_hash": "ab" * 32, "window": 256, "stride": 256, "predicted_tokens": 59765}
EVIL = "<script>document.title='owned'</script>"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
PATIENCE = 120_000  # milliseconds: a machine that trains beside the tests is slow


def record_of(make_record, method, target, bits, gap, **changes):
    interval = [gap - 0.05 * abs(gap) - 1e-4, gap + 0.05 * abs(gap) + 1e-4]
    config = (
        {"ptq": {"_target_": f"bitnet.ptq.{target}", "bits": round(bits)}}
        if target
        else {"quantizer": {"_target_": "x"}}
    )
    fields = {"method": method, "config": config, "bits_per_weight": bits, "nll": 3.8 + gap, "gap": gap}
    fields |= {"perplexity": math.exp(3.8 + gap), "gap_interval": interval, "evaluation": EVALUATION}
    return make_record(**{**fields, "bytes": int(5e6 + 1e6 * bits), **changes})


def full_precision(make_record):
    fields = {"method": "full precision", "nll": 3.8, "perplexity": math.exp(3.8), "bits_per_weight": 16.0}
    return make_record(**fields, bytes=13_638_144, evaluation=EVALUATION, config={})


@pytest.fixture
def runs(tmp_path, make_record):
    """Eight results with everything that may stand beside a record; one has a name that would like to be a script."""
    folder = tmp_path / "runs"
    full_precision(make_record).write(folder / "0" / "reference.json")
    results = [
        ("gptq", "GPTQ", 2.15, 0.116),
        ("gptq", "GPTQ", 4.16, 0.0041),
        ("kquant", "KQuant", 2.625, 0.036),
        ("kquant", "KQuant", 4.5, 0.0023),
        ("absmax", "RoundToNearest", 1.74, 1.53),
        ("bitnet158 frozen", None, 1.62, 0.21),
        (EVIL, "Strange", 3.0, 0.05),
    ]
    for number, (method, target, bits, gap) in enumerate(results):
        record = record_of(make_record, method, target, bits, gap, command=f"python train.py number={number} {EVIL}")
        record.write(folder / str(number) / "run.json")
        if target:
            lines = [
                f"model.layers.{block}.{kind},8,8,{bits},{gap / (block + 1)},{gap},0.1"
                for block in range(6)
                for kind in ("self_attn.q_proj", "mlp.up_proj")
            ]
            heading = "name,out_features,in_features,bits_per_weight,relative_error,weight_error,seconds"
            (folder / str(number) / "layers.csv").write_text("\n".join([heading, *lines]) + "\n")
        else:
            csv = folder / str(number) / "csv" / "version_0"
            csv.mkdir(parents=True)
            lines = [f"{step},{4 + 1 / step},{step * 2048}," for step in range(1, 101)] + ["100,,,4.01"]
            (csv / "metrics.csv").write_text("\n".join(["step,train/loss,train/tokens,val/loss", *lines]) + "\n")
            (folder / str(number) / "samples.md").write_text(f"## Step 100\n\n>     once upon {EVIL}\n\n")
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a file; at the end of the test the page must have kept quiet and within itself."""
    opened = []

    def open_page(path, **options):
        context = browser.new_context(**options)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        said, asked = [], []
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: asked.append(request.url))
        opened.append((context, said, asked))
        page.goto(f"file://{path}")
        page.wait_for_selector("body[data-ready]")
        return page

    yield open_page
    for context, said, asked in opened:
        context.close()
        assert said == []
        assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def names(page):
    return [text.strip() for text in page.locator("tr.row .name").all_inner_texts()]


def test_the_page_draws_sorts_filters_and_tells(runs, tmp_path, visit):
    path, notes = write_page([runs], tmp_path / "report")
    assert notes == []
    page = visit(path, viewport={"width": 1440, "height": 900})
    assert page.title() == "Quantization report"  # and not what the script in a name would make of it
    for chart in ("quality", "gaps", "bytes", "layers", "curves"):
        assert page.locator(f'[data-plot="{chart}"] svg').count() == 1, chart
    assert page.locator('[data-chart="codes"]').is_hidden()
    assert page.locator('[data-plot="quality"] svg').bounding_box()["width"] > 900
    marks = page.locator('[data-plot="quality"] .mark-symbol.role-mark path')
    assert marks.count() == 7

    assert names(page)[:2] == ["full precision", "kquant bits=4"]  # by perplexity
    page.get_by_role("button", name="bits/weight").click()
    assert names(page)[:2] == ["bitnet158", "absmax"]
    page.get_by_role("button", name="bits/weight").click()
    assert names(page)[0] == "full precision"
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="gap", exact=True).click()
    assert names(page)[-1] == "full precision"  # what has no gap comes last

    page.get_by_role("searchbox").fill("number=2")
    assert names(page) == ["kquant bits=3"]
    page.get_by_role("searchbox").fill("")
    page.get_by_role("button", name="QAT", exact=True).click()
    assert names(page) == ["bitnet158"]
    page.get_by_role("button", name="all", exact=True).click()
    page.get_by_label("Most bits a weight").fill("2")
    assert sorted(names(page)) == ["absmax", "bitnet158"]

    marks.last.click()  # whatever the filter hides is shown
    assert page.locator("tr.detail code").inner_text().startswith("python train.py number=")
    assert page.locator("tr.row").count() == 8
    assert EVIL in page.locator("tr.detail code").inner_text()
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()


def test_hovering_shows_the_record(runs, tmp_path, visit):
    path, _ = write_page([runs], tmp_path / "report")
    page = visit(path, viewport={"width": 1440, "height": 900})
    mark = page.locator('[data-plot="quality"] .mark-symbol.role-mark path[aria-label*="bitnet158"]')
    mark.hover()
    tip = page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert all(words in tip.inner_text() for words in ("bitnet158", "QAT", "1.620", "+0.210 nats", "0.199 to 0.221"))
    page.locator('[data-plot="layers"] path[aria-label*="q_proj"]').first.hover()
    page.wait_for_function("document.querySelector('#vg-tooltip-element').innerText.includes('model.layers.')")


def test_the_gap_axis_takes_published_points_and_the_legend_dims_the_others(runs, tmp_path, visit):
    path, _ = write_page([runs], tmp_path / "report")
    page = visit(path, viewport={"width": 1440, "height": 900})
    page.get_by_role("button", name="Gap in nats").click()
    page.get_by_label("published points").check()
    page.locator('[data-plot="quality"] path[aria-label*="BitNet b1.58 700M"]').wait_for()
    note = page.locator('[data-note="published"]').inner_text()
    assert "are no comparison" in note
    assert "GPTQ 6.7B in 2 bits, +4.22 nats" in note
    page.locator('[data-chart="quality"] [data-family="GPTQ (PTQ)"]').click()
    page.wait_for_function("document.querySelectorAll('[data-plot=bytes] path[opacity=\"0.12\"]').length === 6")


def test_the_page_fits_a_phone_and_a_reader_of_the_dark(runs, tmp_path, visit):
    path, _ = write_page([runs], tmp_path / "report")
    page = visit(path, viewport={"width": 375, "height": 740}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 25)"
    label = page.locator('[data-plot="gaps"] .role-axis-label text').first
    assert label.evaluate("node => getComputedStyle(node).fill") != "rgb(0, 0, 0)"
    page.emulate_media(media="print", color_scheme="dark")  # paper is white
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("[data-csv]").is_hidden()


def test_the_table_is_worked_from_the_keyboard_and_saved(runs, tmp_path, visit):
    path, _ = write_page([runs], tmp_path / "report")
    page = visit(path, viewport={"width": 1440, "height": 900})
    page.locator("tr.row .name").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("tr.row .name").first.get_attribute("aria-expanded") == "true"
    assert page.evaluate("document.activeElement.className") == "name"
    assert page.locator("tr.detail").count() == 1
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as CSV").click()
    lines = download.value.path().read_text().splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("label,kind,family,model,bits")


def test_five_thousand_records_stay_usable(tmp_path, make_record, visit):
    full_precision(make_record).write(tmp_path / "runs" / "reference.json")
    plain = json.loads(record_of(make_record, "gptq", "GPTQ", 2.0, 0.1).write(tmp_path / "one.json").read_text())
    for number in range(5000):
        gap = 0.002 * 1.0013**number
        plain |= {"bits_per_weight": 1.5 + (number * 7919 % 5000) / 1500, "nll": 3.8 + gap, "gap": gap, "seed": number}
        plain |= {"perplexity": math.exp(3.8 + gap), "gap_interval": [gap * 0.9, gap * 1.1]}
        folder = tmp_path / "runs" / f"{number:04}"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(plain))
    started = time.process_time()
    path, _ = write_page([tmp_path / "runs"], tmp_path / "report")
    written = time.process_time() - started
    page = visit(path, viewport={"width": 1440, "height": 900})
    spent = page.evaluate(
        """async () => {
          const timed = (work) => {
            const start = performance.now();
            work();
            document.body.offsetHeight;
            return performance.now() - start;
          };
          const search = document.querySelector('input[type=search]');
          search.value = 'gptq 49';
          const typed = timed(() => search.dispatchEvent(new Event('input')));
          const sorted = timed(() => document.querySelectorAll('th button')[2].click());
          const start = performance.now();
          await GROUPS[0].quality();
          return { typed, sorted, drawn: performance.now() - start };
        }"""
    )
    page.get_by_role("searchbox").fill("")
    assert page.locator("tr.row").count() == 100
    page.get_by_role("button", name="Show 500 more").click()
    assert page.locator("tr.row").count() == 600
    if os.environ.get("BITNET_TIMES"):
        print({"written": written, "megabytes": path.stat().st_size / 1e6, **spent})
    assert path.stat().st_size < 8e6
    # Milliseconds; ten times what a quiet core takes, so that a busy one passes and a quadratic table does not.
    assert spent["typed"] < 2_000
    assert spent["sorted"] < 2_000
    assert spent["drawn"] < 20_000
