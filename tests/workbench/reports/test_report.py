from __future__ import annotations

import copy
import io
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import chain, pairwise

import pytest
from report_examples import LENGTHS, RATES, example
from rich.console import Console

from regard.contract import Unsupported
from regard.measurement import units
from regard.workbench.comparison.summary_table import figures_table, terminal_table
from regard.workbench.reports import charts, view
from regard.workbench.reports.charts import Series
from regard.workbench.reports.labels import place_labels, shortened, spread
from regard.workbench.reports.markers import numbers
from regard.workbench.reports.pages import pages
from regard.workbench.reports.report import render, write_report
from regard.workbench.reports.scales import Axis
from regard.workbench.reports.view import Measured

VOID = {"meta", "link", "line", "circle", "polygon", "polyline", "path", "br"}
NO_RECOMMENDATION = {"text": "", "reason": "", "winner": None, "notes": []}


class Page(HTMLParser):
    """A parsed page: elements as (tag, attributes, enclosing tags), text, and whether tags are balanced."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.words, self.open, self.balanced = [], [], [], True
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.balanced = False

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        """The attributes of every element with this tag."""
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def count(self, name):
        """Number of elements with the class `name`."""
        return sum(name in (attributes.get("class") or "").split() for _, attributes, _ in self.elements)


@pytest.fixture(scope="module")
def rows():
    return example(tasks=2, mechanisms=5, seeds=3)


@pytest.fixture(scope="module")
def whole(rows):
    return render(Measured(**rows))


def shown(page):
    """The page as first shown, without charts that appear on selection."""
    return re.sub(r'<div class="choice" hidden>.*?</div>', "", page, flags=re.DOTALL)


def section(page, name):
    page = shown(page)
    return Page(re.search(rf'<section id="{name}">.*?</section>', page, re.DOTALL).group())


def printed(table, width=200):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def test_marks_are_as_many_as_the_data(rows, whole):
    cells = len(rows["summary"]) * 5
    quality, cost, search = (section(whole, name) for name in ("quality", "cost", "search"))
    assert quality.count("chart") == len(rows["summary"])
    assert quality.count("point") == quality.count("label") == quality.count("whisker") == cells
    assert quality.count("seed") == len(rows["quality"])
    fronts = [sum(entry["on_front"] for entry in entries) for entries in rows["summary"].values()]
    assert quality.count("front") == sum(size > 1 for size in fronts)
    assert cost.count("chart") == 3 * len(rows["summary"])
    assert cost.count("dot") == 3 * len(LENGTHS) * cells
    assert cost.count("line") == 3 * cells
    assert cost.count("whisker") == len(LENGTHS) * cells
    crossings = [row[f"efficiency_length_{of}"] for row in rows["cost"] for of in ("time", "memory")]
    assert cost.count("ring") == sum(length is not None for length in crossings)
    assert section(whole, "training").count("line") == len(rows["quality"])
    lost = sum(row["diverged"] for row in rows["search"])
    assert search.count("cross") == lost
    assert search.count("dot") == len(rows["search"]) - lost
    one_task = render(Measured(**example(tasks=1, mechanisms=3)))
    assert section(one_task, "cost").count("chart") == 4, "the state too"


def test_page_is_whole_refers_to_nothing_outside_and_has_commands_that_make_each_row_again(rows, whole):
    page = Page(whole)
    assert page.balanced and not page.open
    assert not re.search(r"https?:|@import|url\((?!data:)", whole)
    references = [a.get(name) for _, a, _ in page.elements for name in ("src", "href", "xlink:href") if a.get(name)]
    assert all(reference.startswith(("data:", "#")) for reference in references)
    copied = [a["data-copy"] for a in page.all("button") if "data-copy" in a]
    assert sorted(copied) == sorted([rows["run"]["command"], *(row["reproduce"] for row in rows["quality"])])


def test_every_chart_has_a_title_and_a_description_of_its_own_and_holds_its_marks(whole):
    page = Page(whole)
    identities = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(identities) == len(set(identities))
    for attributes in page.all("svg"):
        if attributes.get("class") == "chart":
            assert attributes["role"] == "img" and "viewbox" in attributes
            assert set(attributes["aria-labelledby"].split()) <= set(identities)
    for tag, attributes, around in page.elements:
        if "svg" in around and attributes.get("class", "").split()[:1] in (["dot"], ["point"], ["label"], ["seed"]):
            across, down = (float(attributes.get(f"c{axis}", attributes.get(axis, "0"))) for axis in "xy")
            assert 0 <= across <= charts.WIDTH and 0 <= down <= charts.HEIGHT, tag


def test_the_rule_of_a_task_is_a_line_and_a_row_in_its_place(rows):
    page = render(Measured(**rows))
    assert section(page, "quality").count("rule") == 2
    text = section(page, "table").text
    for task, entries in rows["summary"].items():
        rule = rows["run"]["baselines"][task]
        assert f"{rule['name']} {task} {units.number(rule['score'])} a rule without training" in text
        place = text.index(rule["name"])
        for entry in entries:
            better = (entry["mean"] > rule["score"]) == rule["higher_is_better"]
            assert entry["beside_baseline"] == ("ahead" if better else "behind")
            own = re.search(rf"{entry['mechanism']} {task} .*?(beats|behind) rule", text)
            assert own[1] == ("beats" if better else "behind")
            assert (own.start() < place) == better
    bare = copy.deepcopy(rows)
    del bare["run"]["baselines"]
    assert section(render(Measured(**bare)), "quality").count("rule") == 0


@pytest.mark.parametrize(("score", "arrow"), [(9.0, "↑"), (-9.0, "↓")])
def test_a_rule_that_is_far_off_does_not_flatten_the_picture(score, arrow):
    far = example(tasks=2, mechanisms=4)
    near = section(render(Measured(**far)), "quality")
    far["run"]["baselines"]["recall"]["score"] = score
    page = section(render(Measured(**far)), "quality")
    assert page.count("rule") == near.count("rule") - 1
    assert f"rule of recall {score:.2f} {arrow}" in page.text


def test_figures_and_words_are_on_the_page(rows):
    page = render(Measured(**rows))
    text = Page(page).text
    run, advice = rows["run"], rows["run"]["recommendation"]
    assert all(words in text for words in (run["title"], advice["text"], advice["reason"], rows["revision"]))
    assert all(note in text for note in advice["notes"])
    for entry in rows["summary"]["recall"]:
        mean, error = units.with_error(entry["mean"], entry["standard_error"])
        assert f"{mean} ± {error}" in text
    for fact in ("cpu", "os", "python", "torch", "numpy", "regard", "machine_id"):
        assert rows["machine"][fact] in text


def test_models_of_images_are_called_models_and_have_no_costs_that_nobody_measured(rows):
    found = json.loads(json.dumps(rows).replace("softmax", "van_nano").replace("gated_linear", "vit_nano"))
    found["run"] |= {"whole_models": True, "at_length": dict.fromkeys(found["run"]["tasks"], 64)}
    for entry in (entry for entries in found["summary"].values() for entry in entries):
        entry |= {"decode_tokens_per_second": None, "state_bytes": math.nan}
    page, mechanisms = render(Measured(**found)), render(Measured(**rows))
    shown = re.sub(r"<(template|script|style).*?</\1>", "", page, flags=re.DOTALL)
    for word in ("Decoding, tokens/s", ">State<", "efficiency length", "to even out the parameters", ">Mechanism<"):
        assert word in mechanisms and word not in shown, word
    assert f"<b>{len(found['run']['mechanisms'])}</b> models" in shown and "(inference at 64 tokens)" in shown
    assert "decode/s" not in printed(terminal_table(found["summary"])) and "in training" in printed(
        terminal_table(found["summary"])
    )


def test_names_are_escaped(rows):
    name = "<script>alert('&\"')</script>"
    hostile = copy.deepcopy(rows)
    hostile["run"]["mechanisms"][1] = name
    hostile["run"]["title"] = hostile["run"]["recommendation"]["winner"] = name
    hostile["summary"][name] = hostile["summary"].pop("recall")
    for row in chain(hostile["quality"], hostile["cost"], hostile["search"], *hostile["summary"].values()):
        renamed = {"gated_linear", "recall"} & {row["mechanism"], row.get("task")}
        row.update({key: name for key in ("mechanism", "task") if row.get(key) in renamed})
    page = render(Measured(**hostile))
    assert page.count("<script>") == 1
    assert name in Page(page).text and Page(page).balanced


def spoil(value, bad):
    """Return a copy in which about a third of all floats are replaced."""
    if isinstance(value, dict):
        return {key: spoil(item, bad) for key, item in value.items()}
    if isinstance(value, list):
        return [spoil(item, bad) for item in value]
    return bad if isinstance(value, float) and random.random() < 0.35 else value


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, 0.0, -1.0])
def test_missing_and_strange_numbers_are_drawn_around(rows, bad):
    spoiled = {**rows, **{name: spoil(rows[name], bad) for name in ("quality", "cost", "summary")}}
    spoiled["search"] = [{**row, "score": spoil(row["score"], bad)} for row in rows["search"]]
    page = render(Measured(**spoiled))
    assert Page(page).balanced and "None" not in Page(page).text
    assert not re.search(r'[ "](nan|inf|-inf)[ ",]|>nan<', page.lower())


def test_diverged_models_have_no_score_and_say_so(rows):
    lost = copy.deepcopy(rows)
    for row in chain(lost["quality"], *lost["summary"].values()):
        if row["mechanism"] == "mamba2":
            row.update(score=None, mean=None, standard_error=None)
    page = render(Measured(**lost))
    assert section(page, "quality").count("point") == 2 * 4
    assert "Without a score or this cost: mamba2" in Page(page).text
    assert "no score" in section(page, "table").text


@pytest.mark.parametrize(("tasks", "mechanisms", "seeds"), [(1, 1, 1), (1, 2, 1), (4, 12, 2)])
def test_small_and_large_comparisons_render(tasks, mechanisms, seeds):
    whole = render(Measured(**example(tasks, mechanisms, seeds)))
    page = Page(shown(whole))
    assert page.balanced and Page(whole).balanced
    assert page.count("point") == tasks * mechanisms


def test_of_many_mechanisms_all_are_marked_and_the_important_ones_named(monkeypatch):
    many = example(2, 12, 2)
    assert section(render(Measured(**many)), "quality").count("label") == 2 * 12
    monkeypatch.setattr(view, "MOST_NAMED", 11)
    page = render(Measured(**many))
    front = {entry["mechanism"] for entries in many["summary"].values() for entry in entries if entry["on_front"]}
    important = front | {"softmax", many["run"]["recommendation"]["winner"]}
    assert section(page, "quality").count("point") == 2 * 12
    assert section(page, "quality").count("label") == 2 * len(important) < 2 * 12
    assert "With this many mechanisms" in Page(page).text


def test_an_empty_comparison_renders():
    run = {"title": "Nothing", "tasks": ["recall"], "mechanisms": ["softmax"], "recommendation": NO_RECOMMENDATION}
    page = Page(render(Measured(run=run, quality=[], cost=[], search=[], summary={}, machine={})))
    assert page.balanced and "No recommendation was made." in page.text
    assert (page.count("chart"), page.count("empty")) == (0, 4)


@pytest.mark.parametrize(
    ("tied", "told"), [(True, "gated_linear, cannot be told apart from softmax"), (False, "gated_linear is ahead")]
)
def test_ties_are_named(rows, tied, told):
    changed = copy.deepcopy(rows)
    for entry in changed["summary"]["recall"]:
        entry["separable_from_best"] = not (tied and entry["mechanism"] == "softmax")
    best = next(e for e in changed["summary"]["recall"] if e["mechanism"] == "gated_linear")
    best["mean"] = 0.999
    assert told in Page(render(Measured(**changed))).text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Take softmax: it is the cheapest.", "It is the cheapest."),
        ("Take softmax: gated_linear and softmax solve recall.", "gated_linear and softmax solve recall."),
    ],
)
def test_a_sentence_begins_with_a_capital_and_a_mechanism_as_it_is_spelled(rows, text, told):
    changed = copy.deepcopy(rows)
    changed["run"]["recommendation"] = {"winner": "softmax", "text": text}
    assert f'<p class="why">{told}</p>' in render(Measured(**changed))


def test_rate_at_the_edge_of_its_grid_is_warned_of(rows):
    def told(chosen):
        """The text about learning rates if `chosen` gives the chosen rate for each task and mechanism."""
        edge = copy.deepcopy(rows)
        for row in edge["quality"]:
            row["lr"] = chosen(row["task"], row["mechanism"])
        return section(render(Measured(**edge)), "search").text

    assert "Edge of the grid" not in told(lambda *_: RATES[1])
    lowest = told(lambda *where: RATES[0] if where == ("recall", "sigmoid") else RATES[1])
    assert "Edge of the grid on recall: sigmoid (3e-4, the lowest)." in lowest
    highest = told(lambda _, mechanism: RATES[-1] if mechanism == "mamba2" else RATES[1])
    assert highest.count("mamba2 (0.01, the highest)") == highest.count("Edge of the grid") == 2


def test_file_is_replaced_in_one_step(rows, tmp_path):
    path = tmp_path / "new" / "report.html"
    assert write_report(path, Measured(**rows)) == path
    first = path.read_text(encoding="utf-8")
    assert first == render(Measured(**rows))
    with pytest.raises(KeyError):
        write_report(path, Measured(**{**rows, "quality": [{}]}))
    assert path.read_text(encoding="utf-8") == first
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_path_that_cannot_be_written_is_refused(rows, tmp_path):
    (tmp_path / "plain").touch()
    for path in (tmp_path / "plain" / "report.html", tmp_path):
        with pytest.raises(Unsupported, match="cannot be written"):
            write_report(path, Measured(**rows))
    assert [file.name for file in tmp_path.iterdir()] == ["plain"]


def test_spread_labels_do_not_overlap_and_keep_their_order():
    for _ in range(50):
        wanted = [random.uniform(-20, 220) for _ in range(random.randrange(1, 15))]
        placed = spread(wanted, 14, 0, 200)
        ordered = [at for _, at in sorted(zip(wanted, placed, strict=True))]
        assert all(b - a >= 14 - 1e-9 for a, b in pairwise(ordered))
        assert ordered[0] >= -1e-9 and ordered[-1] <= 200 + 1e-9
    for already in ([10, 60, 150], []):
        assert spread(already, 14, 0, 200) == already


def test_long_names_are_shortened_so_that_they_stay_apart():
    names = [
        "softmax",
        "dynamicvit, trained to keep a half",
        "dynamicvit, trained to keep a third",
        "another name that is too long",
    ]
    found = shortened([*names, names[1]])
    assert found[:2] == ["softmax", "dynamicvit,… keep a half"]
    assert len(set(found)) == len(names) and max(map(len, found)) == 24
    assert found[1] == found[4] and found[3] == "another name that is to…"


def test_labels_of_points_do_not_overlap():
    frame = (0.0, 0.0, 380.0, 292.0)
    for _ in range(20):
        points = [(random.uniform(40, 340), random.uniform(30, 260)) for _ in range(8)]
        boxes = place_labels(points, [8.0] * 8, [70.0] * 8, [], frame)
        for i, a in enumerate(boxes):
            assert frame[0] - 1 <= a[0] and a[2] <= frame[2] + 1
            for b in boxes[:i]:
                assert min(a[2], b[2]) - max(a[0], b[0]) <= 1 or min(a[3], b[3]) - max(a[1], b[1]) <= 1


def test_ticks_lie_inside_and_are_few():
    for _ in range(200):
        low = 10 ** random.uniform(-6, 9)
        high = low * 10 ** random.uniform(0, 6)
        scales = [Axis("", log=True, base=base).scale([low, high], 0, 100) for base in (2, 10)]
        for scale in (*scales, Axis("").scale([low, high], 100, 0)):
            assert 2 <= len(scale.ticks) <= 8
            assert all(-1e-6 <= scale(t) <= 100 + 1e-6 for t in scale.ticks)


def test_lines_break_where_a_value_is_missing():
    series = Series(0, "softmax", [(1, 1.0), (2, 2.0), (3, None), (4, 2.0), (5, math.nan), (6, 1.0), (7, 3.0)])
    chart = Page(charts.lines("a", "", "", [series], Axis("x"), Axis("y")))
    assert chart.count("line") == 2
    assert chart.count("dot") == 5
    assert charts.lines("a", "", "", [Series(0, "softmax", [(1, None)])], Axis("x"), Axis("y")) is None


def test_terminal_table_has_every_cell(rows):
    spoiled = copy.deepcopy(rows["summary"])
    spoiled["recall"][0].update(mean=None, inference_ms=math.nan, mechanism="[red]odd[/red]")
    text = printed(terminal_table(spoiled))
    assert "[red]odd[/red]" in text and "no score" in text and "nan" not in text
    assert len(text.strip().splitlines()) >= 1 + 2 * 5


def test_what_a_task_tells_beside_its_score_is_shown_for_each_mechanism(rows):
    assert figures_table(rows["summary"]) is None and "Further figures for" not in render(Measured(**rows))
    told = copy.deepcopy(rows)
    first, second, *_ = told["summary"]["recall"]
    first["figures"], second["figures"] = {"error <far> out": 0.125}, {"error <far> out": None}
    text = printed(figures_table(told["summary"]), width=100)
    assert "error <far> out" in text and "0.125" in text and "—" in text
    page = render(Measured(**told))
    assert (
        "Further figures for recall" in page
        and "error &lt;far&gt; out" in page
        and page.count("<h3>Further figures for") == 1
    )


def test_a_rule_with_a_long_name_leaves_room_for_the_costs(rows):
    rules = {"recall": {"name": "a rule with many words to say what it does", "score": 0.5, "higher_is_better": True}}
    text = printed(terminal_table(rows["summary"], rules, width=100), width=100)
    assert "a rule with many words to…" in text and "decode/s" in text


def test_a_terminal_of_80_columns_shows_names_whole_in_as_many_lines_as_they_need(rows):
    name = "gated_linear:output_norm=null,gate=swish*3+softmax"
    summary = {task: [{**entry, "mechanism": name} for entry in entries] for task, entries in rows["summary"].items()}
    lines = printed(terminal_table(summary), width=80).splitlines()
    assert name in "".join(line.replace("★", " ").split()[0] for line in lines if line.strip())
    assert max(map(len, lines)) <= 80
    assert all("gated_linear:" in line for line in lines if " ± " in line)
    narrow = printed(terminal_table(summary, width=40), width=40).splitlines()
    assert all("gated_linear" in line for line in narrow if "." in line)


def test_terminal_table_has_the_rule_in_its_place(rows):
    summary = {
        task: sorted(entries, key=lambda e: e["mean"] if task == "language_model" else -e["mean"])
        for task, entries in rows["summary"].items()
    }
    summary["recall"][-1]["mean"] = None
    lines = [line.split() for line in printed(terminal_table(summary, rows["run"]["baselines"])).splitlines()]
    for task, entries in summary.items():
        own = lines[lines.index([task]) + 1 :][: len(entries) + 1]
        place = next(i for i, line in enumerate(own) if line[:3] == ["rule", "of", task])
        assert place == sum(e["mean"] is not None and e["beside_baseline"] == "ahead" for e in entries)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_browser_shows_the_charts_without_a_complaint(rows, tmp_path):
    path = write_report(tmp_path / "report.html", Measured(**rows))
    probe = """
    <script>
      const choice = document.querySelector(".axis select");
      choice.selectedIndex = 1;
      choice.dispatchEvent(new Event("change"));
      document.body.dataset.axis = document.querySelector(".choice:not([hidden]) svg title").textContent;
      document.body.dataset.lines = document.getElementById("regard.csv").content.textContent.trim().split("\\n").length;
      document.body.dataset.schema = JSON.parse(document.getElementById("regard.json").content.textContent).schema;
      document.querySelector("#table thead button").click();
      document.querySelector("[data-highlight]").click();
      document.getElementById("theme").click();
      const sizes = [...document.querySelectorAll("svg.chart")].map((c) => c.getBoundingClientRect().width);
      document.body.dataset.wide = document.documentElement.scrollWidth - innerWidth;
      document.body.dataset.charts = sizes.filter((w) => w > 200).length;
      document.body.dataset.first = document.querySelector("#table tbody tr td").dataset.sort;
      document.body.dataset.dimmed = document.querySelectorAll(".dim").length > 0;
    </script>"""
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    flags += "--disable-sync --no-first-run --enable-logging=stderr --v=0 --window-size=500,900 --dump-dom"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "CONSOLE" not in done.stderr
    page = Page(done.stdout)
    ((body,), (html,)) = page.all("body"), page.all("html")
    expected = sum(a.get("class") == "chart" for _, a, _ in Page(shown(text)).elements)
    assert "tokens trained per second" in body["data-axis"]
    assert int(body["data-lines"]) == 1 + sum(len(entries) for entries in rows["summary"].values())
    assert int(body["data-schema"]) == view.SCHEMA
    assert int(body["data-charts"]) == expected > 0
    assert int(body["data-wide"]) <= 0
    assert body["data-first"] == min(row["mechanism"] for row in rows["quality"])
    assert body["data-dimmed"] == "true"
    assert html["data-theme"] in ("light", "dark")


def test_a_mechanism_has_the_same_colour_in_every_report_and_no_two_are_alike():
    catalogue = ["aaren", "gated_linear", "local", "softmax"]
    few = numbers(["local", "softmax"], catalogue)
    many = numbers(["softmax", "local:window=8", "aaren", "local", "local+softmax", "mine"], catalogue)
    assert {name: many[name] for name in few} == few
    assert len(set(many.values())) == 6


def test_a_command_breaks_between_its_words_alone():
    page = pages().from_string("{{ 'a <b> --output x' | words }}").render()
    assert page == " ".join(f'<span class="word">{word}</span>' for word in ("a", "&lt;b&gt;", "--output", "x"))


@pytest.mark.parametrize("rising", [True, False])
def test_what_is_beyond_the_limit_of_an_axis_is_drawn_at_its_edge(rising):
    points = [charts.ScatterPoint(i, str(i), 1.0 + i, y) for i, y in enumerate((1.0, 1.5, 2.0, 700.0))]
    axis = Axis("y", log=True, base=2, rising=rising, limit=2.0)
    drawn = charts.scatter("beyond", "title", "description", points, Axis("x"), axis)
    scale = axis.scale([p.y for p in points], 0.0, 100.0)
    assert scale(700.0) == scale(2.0) != scale(1.5)
    heights = [float(y) for y in re.findall(r' c?y[12]?="(-?[0-9.]+)"', drawn)]
    assert min(heights) >= 0 and max(heights) <= charts.HEIGHT
