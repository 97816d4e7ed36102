"""The report: what is in the page, and that a real browser shows it without an error, with the JSON's numbers."""

from __future__ import annotations

import random
import re
import shutil

import pytest

from pytransformer import cli
from pytransformer.benchmarks import _report, suite
from pytransformer.benchmarks._case import BYTES, OURS, PEER
from pytransformer.benchmarks._figures import figures, raised_peaks
from pytransformer.benchmarks._file import SCHEMA, load, save
from pytransformer.benchmarks._run import _blank

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PEAK, COPY = 3e11, 2e10


def made_up(names=("cpu", "complexity", "memory")) -> dict:
    """Results as of a run: declared rows, times drawn around what a machine of 300 GFLOP/s would take."""
    draw = random.Random(0)
    rows = []
    cases = [case for name in names for case in suite(name) if not case.alone]
    for case in {case.name: case for case in cases}.values():
        row = _blank(case)
        floor = max(case.operations / PEAK, case.bytes / COPY, 1e-6)
        middles = {PEER: floor * draw.uniform(1.2, 6), OURS: floor * draw.uniform(1.1, 3)}
        middles.update({name: floor * 1.5 for name in case.targets if name not in middles})
        if case.metric == BYTES:
            middles = {name: value * 1e11 for name, value in middles.items()}
        if row["sizes"].get("form") in ("recurrent", "convolution"):
            del middles[OURS]
        for name, middle in middles.items():
            wall = [middle * (1 + abs(draw.gauss(0, 0.04))) for _ in range(20)]
            row["samples"][name] = {"calls": 1, "wall": wall, "cpu": wall}
        row["busy"] = [False] * 20
        rows.append(row)
    rows[1]["wrong"] = {OURS: "output: max error <1> & more"}
    rows[1]["samples"].pop(OURS)
    dtypes = ("float32", "bfloat16", "float16")
    environment = {
        "cpu": "A processor",
        "cores": 2,
        "threads": 2,
        "isa": "avx512",
        "cpu_features": ["avx2"],
        "versions": {"torch": "2.13"},
        "commit": "0123456789abcdef",
        "dirty": False,
        "load": 0.1,
        "gpu": None,
        "started": "2026-01-01T00:00:00+00:00",
        "megahertz": {"now": 2800.0},
        "caches": {"L3": "48M"},
    }
    return {
        "schema": SCHEMA,
        "suite": "made up",
        "settings": {"quick": False, "flush": False, "peers": []},
        "environment": environment,
        "peaks": {"operations": dict.fromkeys(dtypes, PEAK), "sources": dict.fromkeys(dtypes, "a loop"), "gemm": {},
                  "copy": {"1048576": 9e10, "268435456": COPY}},
        "peers": {"openvino": {"version": "1"}, "zentorch": {"absent": "zentorch is not installed"}},
        "rows": rows,
        "finished": True,
    }  # fmt: skip


def test_the_page_is_one_file_with_everything():
    page = _report.html(made_up())
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "@import" not in page
    assert "url(" not in page
    for text in ("Roofline", "Ratio to torch, by size", "Time over length", "O(logₖ n)", "zentorch is not installed"):
        assert text in page
    assert "max error &lt;1&gt; &amp; more" in page
    assert page.count("<tr data-name=") == len(made_up()["rows"])


def test_rows_without_a_plot_leave_it_out():
    page = _report.html(made_up(["memory"]))
    assert "<figure>" not in page
    with pytest.raises(ValueError, match="no row to report"):
        _report.html({**made_up(["memory"]), "rows": []})


def test_the_command_writes_beside_the_results(tmp_path, capsys):
    save(made_up(["overhead"]), tmp_path / "r.json")
    assert cli.main(["bench", "report", str(tmp_path / "r.json")]) == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert cli.main(["bench", "report", str(tmp_path / "none.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


def test_a_browser_shows_the_numbers_of_the_json(browser, tmp_path):
    save(made_up(), tmp_path / "r.json")
    results = load(tmp_path / "r.json")
    _report.write_report(results, tmp_path / "r.html")
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("request", lambda sent: None if sent.url.startswith(("file:", "data:")) else problems.append(sent.url))
    page.goto((tmp_path / "r.html").as_uri())

    shown = page.evaluate(
        "[...document.querySelectorAll('tr[data-name]')].map(row => [row.dataset.name, Object.fromEntries("
        "[...row.querySelectorAll('[data-field]')].map(cell => [cell.dataset.field, cell.dataset.value]))])"
    )
    limits = raised_peaks(results)
    assert sorted(name for name, _ in shown) == sorted(row["name"] for row in results["rows"])
    by_name = {row["name"]: row for row in results["rows"]}
    for name, cells in shown:
        numbers = figures(by_name[name], limits, 2)
        expected = {"ours": numbers.ours, "limit": numbers.limit and numbers.limit.value}
        if numbers.peer is not None:
            expected.update(torch=numbers.peer.median, ratio=numbers.peer.ratio and numbers.peer.ratio.value)
        assert {k: float(cells[k]) for k in cells.keys() & expected.keys()} == {
            k: v for k, v in expected.items() if v is not None
        }
        assert cells["verdict"] == numbers.verdict

    table = page.locator("table.results").first

    def column():
        return table.locator("[data-field=ratio]").evaluate_all("all => all.map(x => Number(x.dataset.value))")

    table.locator("th[data-sort=ratio]").click()
    assert column() == sorted(column())
    table.locator("th[data-sort=ratio]").press("Enter")
    assert column() == sorted(column(), reverse=True)

    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")
    assert page.evaluate(background) != light
    for width in (390, 1200):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.emulate_media(media="print")
    assert not page.locator("#theme").is_visible()
    assert problems == []
