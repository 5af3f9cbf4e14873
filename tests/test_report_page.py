"""tools/report.html in a real browser without a window: what a reader sees, clicks and types."""

import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
import report
import report_statistics
from report_figures import COLORS
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from test_report import MAZES, README, RECORD, make_root, place, run, runs, two_phases, write

WALKER = "reef/hopper/medium-v1"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ODD = "Mine/<b>&'</script>-v0"
SIDE = {"desk": (1280, 900, False), "phone": (400, 800, True)}  # width, height in pixels; is it a phone?
SIDES = SIDE | {"wide": (1440, 900, False)}


@pytest.fixture(scope="module")
def browser():
    """Chromium; in CI the tests fail without one, elsewhere they are skipped."""
    binary, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if not (binary and driver):
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up("no headless browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A page of two algorithms: 3 seeds of two mazes, 3 and 1 of another, mixed updates, odd names."""
    root, curve = make_root(tmp_path_factory.mktemp("root")), [1, 5, 3]
    rows = runs({"iql": [[50, 51, 52], [60, 61, 62]], "bc": [[1, 2, 3], [-4, -5, -6]]}, curve=curve)
    rows += [row for seed in range(3) for row in run("bc", MAZES[2], seed, 7.0, curve=curve)]
    rows += run("iql", MAZES[2], 0, 99.0, curve=curve)
    odd = {"score": None, "success": None, "best_score": None}
    rows += [row | odd for row in run("bc", ODD, curve=[1], return_mean=-0.01, commit="b" * 40 + "+")]
    rows += run("iql", WALKER, 0, 3.0) + run("iql", WALKER, 1, 4.0, update=40_000)
    write(root / "results/scores", rows)
    card = root / f"results/cards/{MAZES[0]}.md"
    card.parent.mkdir(parents=True)
    card.touch()
    config = root / f"configs/offline/iql/{MAZES[0]}.yaml"
    config.parent.mkdir(parents=True)
    config.touch()
    with pytest.MonkeyPatch.context() as patch:
        place(patch, root)
        patch.setattr(report, "draw_figures", lambda *_: iter(()))
        assert report.main([]) == 0
    assert (root / "docs/scores.md").read_text() != README
    return root / "results/report/index.html"


@pytest.fixture
def page(browser, file):
    """The page, opened anew; at the end nothing may have gone wrong in it."""
    show(browser, file)
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0  # no network


def show(browser, file: Path, side: str = "desk", scheme: str = "light", fragment: str = "") -> None:
    width, height, mobile = SIDES[side]
    metrics = {"width": width, "height": height, "mobile": mobile, "deviceScaleFactor": 1}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get("about:blank")
    browser.get(f"{file.as_uri()}{fragment}")


def find(page, selector: str):
    return page.find_element(By.CSS_SELECTOR, selector)


def find_all(page, selector: str) -> list:
    return page.find_elements(By.CSS_SELECTOR, selector)


def click(page, text: str, inside: str = "body") -> None:
    """The button that says so."""
    buttons = find_all(page, f"{inside} button")
    (button,) = [button for button in buttons if button.text.strip().replace("\n", "") == text]
    button.click()


def rows(page, table: str) -> list[list[str]]:
    """What the cells of a table show, line by line."""
    return page.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)]"
        ".map((row) => [...row.children].map((cell) => cell.innerText.replace(/\\s+/g, ' ').trim()))",
        table,
    )


def column(page, table: str, index: int) -> list[str]:
    return [row[index] for row in rows(page, table)]


def heads(page, table: str) -> dict[str, str]:
    shown = find_all(page, f"#{table} thead th")
    return {head.text.strip().replace("\n", ""): head.get_attribute("aria-sort") for head in shown}


def curves(page, place: str = "curves") -> list[str]:
    return [line.get_attribute("data-learner") for line in find_all(page, f"#{place} polyline")]


def test_scores_of_every_dataset(page):
    assert "19 runs: 2 algorithms and their variants on 5 datasets" in find(page, "#summary").text
    names = ["Algorithm", ODD, WALKER, *MAZES]
    assert heads(page, "matrix") == dict.fromkeys(names, "none") | {"Algorithm": "ascending"}
    mixed = "3.5 ± 0.7 2 seeds, 100 and 40,000 updates mixed: updates 100 and 40,000"
    assert rows(page, "matrix") == [
        ["bc", "\u2013 100 updates", "", "2.0 ± 1.0", "\u22125.0 ± 1.0", "7.0 ± 0.0"],
        ["iql", "", mixed, "51.0 ± 1.0", "61.0 ± 1.0", "99.0"],
    ]
    note = find(page, "#note").text
    assert "3 seeds, 300 updates where nothing is said, and one seed where there is no ±" in note


def test_the_table_is_sorted_by_a_click_and_by_keys(page):
    click(page, MAZES[0], "#matrix")
    assert heads(page, "matrix")[MAZES[0]] == "descending"
    assert column(page, "matrix", 0) == ["iql", "bc"]
    click(page, MAZES[0], "#matrix")
    assert heads(page, "matrix")[MAZES[0]] == "ascending"
    assert column(page, "matrix", 0) == ["bc", "iql"]
    page.switch_to.active_element.send_keys(Keys.ENTER)  # the button keeps the focus
    assert heads(page, "matrix")[MAZES[0]] == "descending"
    for _ in range(2):
        click(page, WALKER, "#matrix")
        assert column(page, "matrix", 0) == ["iql", "bc"]  # what is missing stays last
    click(page, "Algorithm", "#matrix")
    assert column(page, "matrix", 0) == ["bc", "iql"]
    click(page, "Algorithm", "#matrix")
    assert column(page, "matrix", 0) == ["iql", "bc"]


def test_datasets_and_algorithms_are_filtered(page):
    click(page, MAZES[0], "#matrix")
    find(page, "#filter").send_keys("mINE/")
    assert [*heads(page, "matrix")] == ["Algorithm", ODD]
    find(page, "#filter").clear()
    find(page, "#filter").send_keys("MAZE/")
    assert [*heads(page, "matrix")] == ["Algorithm", *MAZES]
    assert column(page, "matrix", 0) == ["iql", "bc"]  # the order stays
    assert find(page, "#note").text.startswith("3 of 5 datasets")
    click(page, "bc", "#learners")
    assert column(page, "matrix", 0) == ["iql"]
    assert find(page, "#learners button").get_attribute("aria-pressed") == "false"
    assert page.switch_to.active_element.text.strip() == "bc"  # not lost
    page.switch_to.active_element.send_keys(Keys.SPACE)
    assert column(page, "matrix", 0) == ["iql", "bc"]
    click(page, "Hide all")
    assert rows(page, "matrix") == []
    assert curves(page) == []
    assert "Nothing to draw" in find(page, "#curves").text
    click(page, "Show all")
    assert column(page, "matrix", 0) == ["iql", "bc"]


def test_every_metric(page):
    shown = {
        "Return": ["0.0 100 updates", "20.0 ± 0.0"],  # no -0.0
        "Success": ["\u2013 100 updates", "50% ± 0%"],
        "Best on the way": ["\u2013 100 updates", "90.0 ± 0.0"],
        "Score": ["\u2013 100 updates", "7.0 ± 0.0"],
    }
    for metric, (odd, maze) in shown.items():
        click(page, metric, "#metrics")
        pressed = [button.text for button in find_all(page, "#metrics [aria-pressed=true]")]
        assert pressed == [metric]
        _, first, *_, last = rows(page, "matrix")[0]
        assert (first, last) == (odd, maze)
        note = find(page, "#note").text
        assert ("chosen with the simulator" in note) == (metric == "Best on the way")


def test_what_a_whole_row_shares_is_said_once(page):
    """And a picture of runs that are not alike says so."""
    click(page, "iql", "#learners")
    find(page, "#filter").send_keys("mine")
    assert rows(page, "matrix") == [["bc 1 seed, 100 updates", "\u2013"]]
    click(page, "iql", "#learners")
    Select(find(page, "#dataset")).select_by_visible_text(MAZES[2])
    assert find(page, "#caution").text == "One seed: iql."
    Select(find(page, "#dataset")).select_by_visible_text(MAZES[0])
    assert find(page, "#caution").text == ""
    click(page, "Return", "#metrics")
    Select(find(page, "#dataset")).select_by_visible_text(ODD)
    assert find(page, "#caution").text == "One seed each: no spread is known."


def test_a_cell_opens_its_runs_and_where_they_come_from(page, file):
    assert not find(page, "#record").is_displayed()
    (cell,) = [link for link in find_all(page, "#matrix a") if link.text.startswith("51.0")]
    cell.click()
    assert find(page, "#title").text == f"iql on {MAZES[0]}"
    assert page.switch_to.active_element == find(page, "#title")
    assert column(page, "runs", 0) == ["0", "1", "2"]
    columns = [*heads(page, "runs")]
    first = dict(zip(columns, rows(page, "runs")[0]))
    assert first == {
        "Seed": "0",
        "Score": "50.0",
        "Return": "20.0",
        "Success": "50%",
        "Best on the way": "90.0",
        "Updates": "300",
        "Minutes": "10.0",
        "Commit": "aaaaaaa",
        "Config sha256": "cccccccc",
        "Data sha256": "dddddddd",
    }
    origin = find(page, "#origin").text
    for text in (RECORD["dataset_hash"], "aaaaaaa", "cpu: X", "torch==2.13.0+cpu"):
        assert text in origin
    assert find(page, "#origin code").get_attribute("title") == RECORD["commit"]
    links = {link.text: link.get_attribute("href") for link in find_all(page, "#origin a")}
    assert [*links] == [f"configs/offline/iql/{MAZES[0]}.yaml", "card"]
    for link in links.values():
        assert Path(unquote(link.removeprefix("file://"))).exists()
    assert curves(page) == ["bc", "iql"]
    assert Select(find(page, "#dataset")).first_selected_option.text == MAZES[0]
    click(page, "Seed", "#runs")
    click(page, "Score", "#runs")
    assert column(page, "runs", 1) == ["52.0", "51.0", "50.0"]

    (mixed,) = [link for link in find_all(page, "#matrix a") if "mixed" in link.text]
    mixed.click()
    assert find(page, "#mixed").text == "mixed: updates 100 and 40,000"
    page.back()
    assert find(page, "#title").text == f"iql on {MAZES[0]}"
    assert find(page, "#mixed").text == ""


def test_a_cell_has_an_address(browser, file, page):
    show(browser, file, fragment=f"#offline/iql/{MAZES[1]}/default")
    assert find(page, "#title").text == f"iql on {MAZES[1]}"
    assert find(page, "#matrix [aria-current]").text.startswith("61.0")


def test_odd_names_are_text(page):
    (link,) = [link for link in find_all(page, "#matrix a") if "\u2013" in link.text]
    link.click()
    assert find(page, "#title").text == f"bc on {ODD}"
    assert find_all(page, "main b") == []
    assert find(page, "#origin code").text == "bbbbbbb+"


def test_curves_are_switched(page):
    choice = Select(find(page, "#dataset"))
    assert [option.text for option in choice.options] == [ODD, WALKER, *MAZES]
    choice.select_by_visible_text(MAZES[1])
    assert curves(page) == ["bc", "iql"]
    texts = [text.text for text in find_all(page, "#curves text")]
    assert {"score", "gradient updates", "bc", "iql", "0", "300"} <= {*texts}
    click(page, "iql", "#learners")
    assert curves(page) == ["bc"]
    click(page, "Time", "#axes")
    assert "minutes of training and evaluation" in [text.text for text in find_all(page, "#curves text")]
    click(page, "Return", "#metrics")
    assert "return" in [text.text for text in find_all(page, "#curves text")]
    choice.select_by_visible_text(ODD)
    assert curves(page) == ["bc"]
    click(page, "Score", "#metrics")  # for which it has no references
    assert "Nothing to draw" in find(page, "#curves").text
    click(page, "Show all")
    choice.select_by_visible_text(WALKER)  # which was never evaluated on the way
    assert "Nothing to draw" in find(page, "#curves").text


def test_a_curve_is_where_its_numbers_are(page):
    """Means 1, 5, 3 at 100, 200, 300; the line goes up by as much as it comes down twice over."""
    Select(find(page, "#dataset")).select_by_visible_text(MAZES[1])
    line = find_all(page, "#curves polyline")[1].get_attribute("points")
    (x1, y1), (x2, y2), (x3, y3) = [map(float, point.split(",")) for point in line.split()]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 - y2 == pytest.approx(2 * (y3 - y2), abs=0.3)
    assert y1 > y2
    scale = (y1 - y2) / 4
    (end,) = [
        re.findall(r"[-\d.]+", mark.get_attribute("transform")) for mark in find_all(page, "#curves rect")[1:]
    ]
    assert float(end[0]) == pytest.approx(x3, abs=0.2)
    assert float(end[1]) == pytest.approx(y1 - 60 * scale, abs=2)  # its final score is 61


@pytest.mark.parametrize("ends", [[0, 9, 9, 9, 9], [0, 0, 0, 0, 9], [0, 4, 4, 4, 5, 9], [9] * 5], ids=str)
def test_labels_do_not_collide(page, ends):
    """Each is 14 pixels or more below the one before, all inside; one with room is at its line's end."""
    marks = page.execute_script(
        """
        const host = document.querySelector("#curves");
        const flat = (y) => ({ name: "bc", x: [0, 1], mean: [y, y], min: [y, y], max: [y, y] });
        plot(host, arguments[0].map(flat), { xLabel: "x", yLabel: "y", format: String });
        const place = (node, name) => Number(node.getAttribute(name));
        const lines = [...host.querySelectorAll("polyline")];
        return {
          ends: lines.map((line) => Number(line.getAttribute("points").split(/[ ,]/).at(-1))),
          labels: [...host.querySelectorAll("line[stroke-width='3']")].map((line) => place(line, "y1")),
          height: place(host.querySelector("svg.plot"), "height"),
        };
        """,
        ends,
    )
    labels, wanted = sorted(marks["labels"]), sorted(marks["ends"])
    assert len(labels) == len(wanted) == len(ends)
    assert all(below - above >= 14 - 1e-6 for above, below in zip(labels, labels[1:]))
    assert min(labels) >= 24
    assert max(labels) <= marks["height"] - 38
    if ends.count(ends[0]) == 1:
        assert labels[-1] == pytest.approx(wanted[-1], abs=0.1)
    if ends.count(ends[-1]) == 1:
        assert labels[0] == pytest.approx(wanted[0], abs=0.1)


def test_curves_are_read_out_by_keys(page):
    Select(find(page, "#dataset")).select_by_visible_text(MAZES[1])
    plot = find(page, "#curves svg.plot")
    page.execute_script("arguments[0].focus()", plot)
    plot.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert find(page, "#curves output").text.split("\n") == ["gradient updates: 200", "bc 5.0", "iql 5.0"]
    plot.send_keys(Keys.END)
    assert "gradient updates: 300" in find(page, "#curves output").text
    plot.send_keys(Keys.ARROW_LEFT)
    assert "gradient updates: 200" in find(page, "#curves output").text
    plot.send_keys(Keys.HOME)
    assert "gradient updates: 100" in find(page, "#curves output").text


def test_curves_are_read_out_by_the_mouse(page):
    Select(find(page, "#dataset")).select_by_visible_text(MAZES[1])
    plot = find(page, "#curves svg.plot")
    assert find(page, "#curves output").text == ""
    webdriver.ActionChains(page).move_to_element_with_offset(plot, -plot.rect["width"] // 2 + 60, 0).perform()
    assert "gradient updates: 100" in find(page, "#curves output").text


def test_across_datasets(page):
    text = find(page, "#suites").text
    assert f"On {MAZES[0]}, {MAZES[1]}." in text
    assert "reef/locomotion" not in text
    assert [row[:2] for row in rows(page, "iqm-0")] == [["iql", "6"], ["bc", "6"]]
    assert rows(page, "iqm-0")[0][2].startswith("56.0 [")
    assert rows(page, "improvement-0") == [["bc", "0.00 [0.00, 0.00]", ""], ["iql", "", "1.00 [1.00, 1.00]"]]
    assert [cell.text for cell in find_all(page, "#improvement-0 strong")] == ["1.00 [1.00, 1.00]"]
    assert curves(page, "profile-0") == ["iql", "bc"]
    places = [(text.text, text.rect["y"]) for text in find_all(page, "#profile-0 text")]
    zero, names = dict(places[::-1])["0"], [y for name, y in places if name in ("iql", "bc")]
    assert abs(names[0] - names[1]) >= 12  # both curves end at 0, and neither name is below it
    assert max(names) <= zero + 1
    assert rows(page, "costs")[0][:4] == ["offline/bc", "1", "4", "10"]
    assert not find(page, "#tuned").is_displayed()


@pytest.fixture(scope="module")
def crowd(tmp_path_factory) -> Path:
    """A page of 30 algorithms, one of which is shorter, and two of another family that go on online."""
    root = make_root(tmp_path_factory.mktemp("crowd"))
    names = [f"an_algorithm_{number:02}" for number in range(30)]
    scores = {name: [[number, number + 1, number + 2]] * 3 for number, name in enumerate(names)}
    table = runs(scores, curve=[1, 2])
    table += [row for seed in range(3) for row in run("short", MAZES[0], seed, 5.0, curve=[1])]
    for name in ("cal_ql", "iql"):
        table += two_phases(name)
    write(root / "results/scores", table)
    with pytest.MonkeyPatch.context() as patch:
        place(patch, root)
        patch.setattr(report, "draw_figures", lambda *_: iter(()))
        patch.setattr(report_statistics, "RESAMPLES", 20)
        assert report.main([]) == 0
    return root / "results/report/index.html"


def test_thirty_algorithms_need_no_sideways_scrolling(browser, crowd):
    show(browser, crowd, "wide")
    assert len(rows(browser, "matrix")) == 33
    hidden = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')]"
        ".filter((region) => region.scrollWidth > region.clientWidth).map((region) => region.ariaLabel)")
    assert hidden == []
    assert len(rows(browser, "improvement-1")) == 30
    # 29, 30 and 31 over 28, 29 and 30: 6 of 9 and two ties
    assert rows(browser, "improvement-1")[29][1:3] == ["", "0.78"]
    title = find(browser, "#improvement-1 tbody tr:last-child td:nth-child(3) span").get_attribute("title")
    assert re.fullmatch(r"an_algorithm_29 over an_algorithm_28: 0\.78 \[0\.\d\d, \d\.\d\d\]", title)


def test_a_curve_is_read_out_where_its_run_was(browser, crowd):
    show(browser, crowd)
    Select(find(browser, "#dataset")).select_by_visible_text(MAZES[0])
    plot = find(browser, "#curves svg.plot")
    ends = {"short": 100, "an_algorithm_00": 200, "finetune iql": 800}
    for key, update in ((Keys.HOME, 100), (Keys.ARROW_RIGHT, 200), (Keys.END, 800)):
        plot.send_keys(key)
        told = find(browser, "#curves output").text
        assert f"gradient updates: {update}" in told
        assert [name for name in ends if name in told] == [name for name in ends if ends[name] >= update]
    assert find(browser, "#caution").text == "Unequal updates: 100 to 800."


def test_curves_against_experience(browser, crowd):
    """The offline phase stands left of a line at the switch."""
    show(browser, crowd)
    Select(find(browser, "#dataset")).select_by_visible_text(MAZES[0])
    click(browser, "Experience", "#axes")
    assert curves(browser) == ["finetune cal_ql", "finetune iql"]
    line = find(browser, "#curves polyline").get_attribute("points")
    places = [float(point.split(",")[0]) for point in line.split()]
    switch = float(find(browser, "#switch").get_attribute("x1"))
    assert places[3] == pytest.approx(switch, abs=0.1)
    assert switch - places[0] == pytest.approx((places[7] - switch) * 0.25 * 3 / 4, abs=0.5)
    assert [text.text for text in find_all(browser, "#curves text")].count("offline") == 1
    assert rows(browser, "online")[0] == [
        MAZES[0], "finetune cal_ql", "3", "400", "4,000", "50.0 ± 1.0", "20.0 ± 0.0", "70.0 ± 0.0", "0.40"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("side", SIDE)
def test_readable_on_every_screen(browser, file, page, side, scheme):
    show(browser, file, side, scheme, f"#offline/iql/{MAZES[1]}/default")
    width = SIDE[side][0]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    paper = luminance(
        browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
    )
    assert (paper > 0.5) == (scheme == "light")
    for selector in (
        "h1",
        "#summary",
        "#note",
        "#matrix td a",
        "#matrix small",
        ".suite",
        "#origin a",
        "#costs td",
    ):
        ink = luminance(find(page, selector).value_of_css_property("color"))
        low, high = sorted((paper, ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector  # WCAG 2.2, 1.4.3
    for color in COLORS:
        ink = luminance(" ".join(str(part) for part in bytes.fromhex(color[1:])))
        low, high = sorted((paper, ink))
        assert (high + 0.05) / (low + 0.05) >= 3  # 1.4.11
    for button in find_all(page, "#metrics button, #learners button"):
        assert 0 <= button.rect["x"] <= button.rect["x"] + button.rect["width"] <= width
    for text in find_all(page, "#curves text"):
        assert 0 <= text.rect["x"] <= text.rect["x"] + text.rect["width"] <= width


def luminance(color: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG 2.2 defines it."""
    parts = [int(number) / 255 for number in re.findall(r"\d+", color)[:3]]
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
