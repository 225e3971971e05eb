"""The report page: self-contained, safe for any text of a policy, complete without some files, of several runs."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlhf_accel.__main__ import main
from rlhf_accel.algorithm import frontier
from rlhf_accel.config.loading import to_yaml
from rlhf_accel.config.schema import Config
from rlhf_accel.runs import json_lines
from rlhf_accel.runs.metrics import METRICS
from rlhf_accel.runs.report import charts, run_data
from rlhf_accel.runs.report import page as report
from rlhf_accel.runs.report.curves import PANELS, UPDATES, frontier_charts, panels
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer

NASTY = "</td><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}\u2028&amp;"


def metrics_row(step: int, **changed: float | None) -> dict[str, float | None]:
    row: dict[str, float | None] = {
        metric.name: 0.1 * step
        for metric in METRICS
        if not metric.name.startswith(("eval/", "step", "optim/skipped")) and not metric.name.endswith("/NAME")
    }
    return {"step": step, "optim/skipped_steps": 0, **row, **changed}


def write_rows(path: Path, rows: list[dict], torn: str = "") -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + torn
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its page and real charts; drawing takes seconds, so it is done once."""
    place = make_run(tmp_path_factory.mktemp("drawn") / "first")
    assert report.write([place]) == (place / "report.html", [])
    return place


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts by their titles only."""
    monkeypatch.setattr(charts, "draw", lambda chart: None)
    monkeypatch.setattr(charts, "png", lambda figure, path: path.touch())
    monkeypatch.setattr(charts, "svg", lambda figure, name, title: f"<svg><title>{title}</title></svg>")


@pytest.fixture
def folder(tmp_path: Path, sketched: None) -> Path:
    """A finished run, with every file that a report reads."""
    return make_run(tmp_path / "first")


def make_run(place: Path, steps: int = 6) -> Path:
    place.mkdir()
    evaluated = {"eval/score": 1.0, "eval/score_ci": 0.1, "eval/kl": 2.0, "eval/kl_ci": 0.2, "eval/gold/mine": 0.3}
    rows = [metrics_row(step, **(evaluated if step % 3 == 0 else {})) for step in range(1, steps + 1)]
    write_rows(place / "metrics.jsonl", rows)
    samples = [
        {"step": step, "prompt": f"prompt {step}", "response": NASTY, "score": 0.5, "kl": None} for step in (1, 3)
    ]
    write_rows(place / "samples.jsonl", samples)
    tree = yaml.safe_load(to_yaml(Config()))
    tree["optim"]["lr"] = 0.123
    tree["run"]["total_steps"] = steps
    (place / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    summary = {
        "steps": steps,
        "seconds": 3725.0,
        "base": {"score": -0.1, "score_std": 1.0, "kl": 0.0},
        "trained": {"score": 1.15, "score_std": 1.0, "kl": 0.7, "score_ci": 0.2},
        "gain": 1.25,
        "samples": [{"prompt": "p", "base": NASTY, "base score": 0.0, "trained": "t", "trained score": 1.5}],
    }
    (place / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    curves = frontier.estimate(np.random.default_rng(0).normal(size=(40, 64))).to_json()
    point = {"kl_low": 0.6, "kl_high": 0.8, "low": 0.4, "high": 0.6}
    curves["points"] = [
        {"name": "final", "step": steps, "kl": 0.7, "gain": 0.5, **point},
        {"name": "step 3", "step": 3, "kl": 0.3, "gain": 0.2, "low": None, "high": None},
    ]
    (place / "frontier.json").write_text(json.dumps(curves), encoding="utf-8")
    models = {"base": {"step": 0, "score": 0.0, "score_ci": 0.1}, "final": {"step": 6, "score": 1.0, "score_ci": 0.1}}
    (place / "evaluation.json").write_text(json.dumps({"models": models}), encoding="utf-8")
    (place / "environment.json").write_text(json.dumps({"machine": {"cpu": "<b>fast</b>"}}), encoding="utf-8")
    return place


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_the_page_fetches_nothing(drawn: Path) -> None:
    page = Page(drawn / "report.html")
    fetching = {"src", "href", "xlink:href", "srcset", "data", "poster", "action", "formaction"}
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in fetching]
    assert links and all(link is not None and link.startswith(("#", "data:")) for link in links), set(links)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import|@font-face|fetch\(|XMLHttpRequest", page.source)
    # The remaining addresses are names of XML vocabularies, which are not fetched.
    assert set(re.findall(r"https?://[^\"'<\s]*", page.source)) == {"http://www.w3.org/1999/xlink"}
    forbids = [attributes["content"] for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes]
    assert len(forbids) == 1 and forbids[0] is not None and forbids[0].startswith("default-src 'none'")


def test_what_a_policy_writes_stays_text(folder: Path) -> None:
    (folder / "config.yaml").write_text("run: {name: '<script>alert(3)</script>'}", encoding="utf-8")
    page = Page(report.write([folder])[0])
    assert [tag for tag, _ in page.tags].count("script") == 1  # the page's own
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert all(tag != "img" for tag, _ in page.tags)
    assert page.source.count("alert(1)") == 3  # two samples and a held-out pair
    assert "{{ 7 * 7 }}" in page.text() and "<b>fast</b>" in page.text()


def test_the_scripts_hash_is_that_of_the_policy(folder: Path) -> None:
    import base64
    import hashlib

    source = report.write([folder])[0].read_text(encoding="utf-8")
    script = re.findall(r"<script>(.*?)</script>", source, flags=re.DOTALL)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in source


def test_the_headline_has_the_results_of_the_run(folder: Path) -> None:
    found = dict(report.headlines([run_data.read_run(folder)]))
    assert found["Held-out score before"] == ["-0.100"] and found["Held-out score after"] == ["+1.150 ± 0.200"]
    assert found["Gain, in standard deviations of the base"] == ["+1.25"] and found["Time"] == ["1:02:05"]
    assert found["KL to the reference, nats per response"] == ["0.70"]
    # Standard normal scores: the optimum's gain at 0.7 nats is sqrt(1.4) = 1.18, of which 0.5 is 42 %.
    (share,) = found["Share of the best gain at that KL"]
    percent = re.fullmatch(r"(\d+)% \(final\)", share)
    assert percent is not None and 40 <= int(percent[1]) <= 45


def test_scaled_models_are_the_way_back_and_not_the_runs_path(folder: Path) -> None:
    """They have the run's last step too, and would replace its final model."""
    tree = json.loads((folder / "frontier.json").read_text())
    path = [point["name"] for point in run_data.in_order(tree["points"])]
    final = next(point for point in tree["points"] if point["name"] == "final")
    for name, kl in (("final@0.5", 0.1), ("final@0.8", 0.4)):
        tree["points"].append({**final, "name": name, "kl": kl})
    (folder / "frontier.json").write_text(json.dumps(tree))
    run = run_data.read_run(folder)
    (chart,) = frontier_charts([run])
    assert [list(course.names) for course in chart.paths] == [path, ["final", "final@0.8", "final@0.5"]]
    assert [(course.dashed, course.label) for course in chart.paths] == [(False, "this run"), (True, "")]
    assert report._share(run).endswith("% (final)")
    tree["points"] = tree["points"][-1:]
    (folder / "frontier.json").write_text(json.dumps(tree))
    alone = run_data.read_run(folder)
    assert [list(course.names) for course in frontier_charts([alone])[0].paths] == [[], ["final@0.8"]]
    assert report._share(alone) == ""


def test_the_share_is_that_of_the_final_model_and_else_of_the_last_step(folder: Path) -> None:
    """best/ may have the last step too; final comes first."""
    tree = json.loads((folder / "frontier.json").read_text())
    tree["points"].append({"name": "best", "step": 6, "kl": 0.7, "gain": 0.25})
    (folder / "frontier.json").write_text(json.dumps(tree))
    run = run_data.read_run(folder)
    assert report._share(run).endswith("% (final)")
    assert [point["name"] for point in run_data.in_order(run.points)] == ["step 3", "best"]
    tree["points"] = tree["points"][1:]
    (folder / "frontier.json").write_text(json.dumps(tree))
    assert report._share(run_data.read_run(folder)).endswith("% (best)")


def test_keys_that_differ_come_before_those_that_are_changed_alike(folder: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "second")
    for place, changed in ((folder, {"lr": 0.5, "eps": 1e-3}), (other, {"lr": 0.5, "eps": 1e-2})):
        defaults = yaml.safe_load(to_yaml(Config()))
        (place / "config.yaml").write_text(yaml.safe_dump({"optim": defaults["optim"] | changed}, sort_keys=False))
    rows = report.config_rows([run_data.read_run(folder), run_data.read_run(other)])
    assert [row["key"] for row in rows if row["changed"]] == ["optim.eps", "optim.lr"]
    assert [row["changed"] for row in rows[:3]] == [True, True, False]


def test_a_share_beyond_the_known_range_is_a_lower_bound(folder: Path) -> None:
    tree = json.loads((folder / "frontier.json").read_text())
    tree["points"][0]["kl"] = 5.0
    (folder / "frontier.json").write_text(json.dumps(tree))
    (share,) = dict(report.headlines([run_data.read_run(folder)]))["Share of the best gain at that KL"]
    assert share.startswith("at least ")


def test_every_chart_is_there_with_a_name_and_as_an_image(drawn: Path) -> None:
    page = Page(drawn / "report.html")
    named = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    expected = ["What the KL bought", *(title for title, _, _ in PANELS), "Gold reward: mine", "Time of a step"]
    assert named == expected
    images = sorted((drawn / "report").glob("*.png"))
    assert len(images) == len(named) and all(image.read_bytes()[:4] == b"\x89PNG" for image in images)
    text = page.text()
    for word in ("nats/token", "known up to here", "best of n", "held-out, 95 %", "policy loss"):
        assert word in text


def test_marks_are_named_in_the_chart() -> None:
    line = charts.Line(x=[1, 2, 3], y=[1.0, float("nan"), 2.0])
    chart = charts.Chart(name="a", title="A & B", y="s", caption="", lines=(line,), marks=(2, 3))
    text = charts.svg(charts.draw(chart), "a", "A & B")
    assert text.count("update skipped") == 1 and 'aria-label="A &amp; B"' in text


def test_skipped_updates_are_marked_where_the_count_grows(folder: Path) -> None:
    counts = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4}
    rows = [metrics_row(step, **{"optim/skipped_steps": count}) for step, count in counts.items()]
    write_rows(folder / "metrics.jsonl", rows)
    run = run_data.read_run(folder)
    assert run_data.skipped_steps(run) == [1, 3, 5]
    marked = {chart.title for chart in panels([run]) if chart.marks == (1, 3, 5)}
    assert marked == set(UPDATES)


def test_with_an_unknown_tail_neither_share_nor_bound_is_shown(folder: Path) -> None:
    tree = json.loads((folder / "frontier.json").read_text())
    tree["no_share"] = "the scores have a heavy upper tail"
    (folder / "frontier.json").write_text(json.dumps(tree))
    run = run_data.read_run(folder)
    assert report._share(run) == "unknown: the scores have a heavy upper tail"
    (chart,) = frontier_charts([run])
    assert len(chart.bound.kl) == 0 and "is unknown: the scores have a heavy" in chart.caption


def test_several_runs_share_their_charts_and_keep_their_colours(folder: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "second", steps=4)
    (other / "frontier.json").unlink()
    output = tmp_path / "pages" / "both.html"
    path, _ = report.write([folder, other], output)
    assert path == output and (output.parent / "both" / "objective-score.png").is_file()
    runs = [run_data.read_run(folder), run_data.read_run(other)]
    for chart in panels(runs):
        if not chart.stacked:
            named = {line.label: line.colour for line in chart.lines if line.label}
            assert named == {"first": 0, "second": 1}, chart.title
            assert {len(line.x) for line in chart.lines} == {6, 4}
    text = Page(path).text()
    assert "Time of a step: first" in text and "Time of a step: second" in text
    assert f"evaluate {other} --frontier" in text and f"evaluate {folder} --frontier" not in text
    # What differs between the runs comes first.
    rows = report.config_rows(runs)
    assert [row["key"] for row in rows if row["differs"]] == ["run.total_steps"] == [rows[0]["key"]]
    assert rows[1]["key"] == "optim.lr" and rows[1]["changed"] and not rows[2]["changed"]


def test_runs_of_the_same_name_are_shown_by_path(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    other = make_run(tmp_path / "b" / "first")
    assert run_data.run_names([folder, other]) == [str(folder), str(other)]


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path, sketched: None) -> None:
    place = tmp_path / "young"
    place.mkdir()
    write_rows(place / "metrics.jsonl", [metrics_row(1, **{"loss/policy": None})], torn='{"step": 2, "obj')
    path, notes = report.write([place])
    text = Page(path).text()
    assert notes == ["young: line 2 of metrics.jsonl is torn and left out"] and notes[0] in text
    assert "running, or stopped, after step 1" in text
    assert "Policy loss" not in text and "Value loss" in text
    for expected in ("evaluate", "No samples were logged", "no config.yaml", "no environment.json"):
        assert expected in text


@pytest.mark.parametrize("name", ["summary.json", "frontier.json", "evaluation.json", "environment.json"])
def test_a_file_that_is_not_json_is_reported_and_left_out(folder: Path, name: str) -> None:
    (folder / name).write_text('{"half": ')
    path, notes = report.write([folder])
    assert len(notes) == 1 and name in notes[0] and name in Page(path).text()


@pytest.mark.parametrize(
    "name", ["summary.json", "frontier.json", "evaluation.json", "environment.json", "config.yaml"]
)
@pytest.mark.parametrize("content", [b"[1]", b"a: \xff", b""])
def test_a_file_of_another_shape_is_reported_and_left_out(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    run = run_data.read_run(folder)
    (note,) = run.notes
    assert note.startswith(f"{name} ") and "left out" in note and "\n" not in note
    report.page([run], [])


def test_a_gold_reward_that_failed_has_no_figure(folder: Path) -> None:
    """Its numbers are null in the summary, for the base, the trained policy, or both."""
    tree = json.loads((folder / "summary.json").read_text())
    tree["base"] |= {"gold/a": 0.25, "gold/b": None}
    tree["trained"] |= {"gold/a": None, "gold/b": None, "win_rate": None, "kl": None}
    (folder / "summary.json").write_text(json.dumps(tree))
    found = dict(report.headlines([run_data.read_run(folder)]))
    assert found["a, not trained on"] == ["+0.250 → unknown"] and found["b, not trained on"] == ["unknown → unknown"]
    assert found["KL to the reference, nats per response"] == ["unknown"] == found["Wins over the base"]


def test_a_summary_from_before_the_run_was_resumed_is_left_out(folder: Path) -> None:
    """run.total_steps was raised, and the run went on from its last checkpoint."""
    write_rows(folder / "metrics.jsonl", [metrics_row(step) for step in range(1, 9)])
    run = run_data.read_run(folder)
    assert run.summary is None and "summary.json is of step 6" in run.notes[0]
    assert report.state(run).startswith("running, or stopped, after step 8")


@pytest.mark.parametrize("gold", ["social_circle", "gold_ci", "vader_ci"])
def test_a_gold_reward_of_any_name_is_shown(folder: Path, gold: str) -> None:
    row = metrics_row(1, **{f"eval/gold/{gold}": 0.5, f"eval/gold_ci/{gold}": 0.25, "eval/win_rate_ci": 0.1})
    write_rows(folder / "metrics.jsonl", [row])
    models = {"base": {f"gold/{gold}": 0.5, f"gold_ci/{gold}": 0.25}}
    (folder / "evaluation.json").write_text(json.dumps({"models": models}))
    run = run_data.read_run(folder)
    shown = {chart.title: chart for chart in panels([run])}
    assert [title for title in shown if title.startswith("Gold") or "ci" in title.split()] == [f"Gold reward: {gold}"]
    assert shown[f"Gold reward: {gold}"].lines[0].half == [0.25]
    ((_, _, rows, _),) = report._models([run])
    assert rows == [(f"gold/{gold}", [(0.5, 0.25)])]


@pytest.mark.parametrize("name", ["length", "score_ci", "mine:length_ci"])
def test_each_of_several_rewards_is_shown(folder: Path, name: str) -> None:
    found = {f"objective/score/{name}": 0.25, f"eval/score/{name}": 0.5, f"eval/score_ci/{name}": 0.125}
    write_rows(folder / "metrics.jsonl", [metrics_row(1, **found)])
    shown = {chart.title: chart for chart in panels([run_data.read_run(folder)])}
    assert [title for title in shown if title.endswith(f": {name}")] == [f"Score: {name}"]
    training, held_out = shown[f"Score: {name}"].lines
    assert (training.y, training.half, held_out.y, held_out.half) == ([0.25], None, [0.5], [0.125])
    tree = {"base": {f"score/{name}": 0.25, "score": 1.0}, "trained": {f"score/{name}": 0.5, "score": 2.0}}
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "steps": 1, **tree}))
    page, _ = report.write([folder])
    assert f"<th>{name}</th>" in page.read_text() or f">{name}<" in page.read_text()
    assert "+0.250 → +0.500" in page.read_text()


def test_a_frontier_of_another_shape_is_reported(folder: Path) -> None:
    (folder / "frontier.json").write_text('{"prompts": 1}')
    path, notes = report.write([folder])
    assert "frontier.json is not as `evaluate --frontier` writes it" in notes[0]
    assert "What the KL bought" not in Page(path).text()


def test_long_runs_show_samples_of_some_steps(folder: Path) -> None:
    rows = [{"step": step, "prompt": "p", "response": "r", "score": 0.0} for step in range(1, 2001)]
    write_rows(folder / "samples.jsonl", rows)
    shown, left_out = report.shown_samples([run_data.read_run(folder)])
    assert len(shown) == 600 and left_out == 1400
    assert shown[0]["step"] == 1 and shown[-1]["step"] == 2000


def test_of_samples_beyond_the_bound_the_last_are_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"step": step, "prompt": "p", "response": "é", "score": 0.0} for step in range(1, 201)]
    write_rows(folder / "samples.jsonl", rows)
    most = (folder / "metrics.jsonl").stat().st_size
    assert most < (folder / "samples.jsonl").stat().st_size
    for name, bound in (("_MOST_BYTES", most), ("_MOST_ROWS", 100)):
        with monkeypatch.context() as patch:
            patch.setattr(json_lines, name, bound)
            run = run_data.read_run(folder)
        steps = [row["step"] for row in run.samples]
        assert steps == list(range(201 - len(steps), 201)) and 0 < len(steps) <= 100
        assert run.notes == ("samples.jsonl is too large to be read whole; its first rows are left out",)
    monkeypatch.setattr(json_lines, "_MOST_BYTES", most - 1)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be read \(more than"):
        run_data.read_run(folder)


def test_a_folder_that_is_not_a_run_ends_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    cases = [
        ([str(tmp_path / "nowhere")], "not a run's folder"),
        ([str(empty)], "holds no whole row yet"),
        ([str(folder), str(tmp_path)], "not a run's folder"),
        ([str(folder)] * 8, "at most 7"),
        ([str(folder), "--output", str(tmp_path / "file" / "page.html")], "--output"),
        ([str(folder), "--output", str(tmp_path / "page")], "page.html"),
    ]
    for arguments, expected in cases:
        with pytest.raises(SystemExit) as end:
            main(["report", *arguments])
        text = capsys.readouterr().err
        assert end.value.code == 2 and expected in text and text.count("\n") == 1 and text.startswith("error: ")


def test_without_matplotlib_the_line_names_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rlhf_accel.runs.report.charts", raising=False)
    monkeypatch.delattr("rlhf_accel.runs.report.charts", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install 'matplotlib"):
        report.write([folder])
    messages: list[str] = []
    report.after_training(folder, messages.append)  # and the run is not affected
    assert len(messages) == 1 and messages[0].startswith("warning: no report") and "pip install" in messages[0]


def test_the_command_prints_where_the_page_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(folder), "--output", str(folder / "page.html")])
    assert f"wrote {folder / 'page.html'}" in capsys.readouterr().out
    assert not (folder / "report.html").exists() and (folder / "page" / "frontier.png").is_file()


@pytest.mark.usefixtures("exact_fp32")
@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_writes_its_report_when_it_ends(
    tiny, wanted: bool, sketched: None, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = PPOTrainer(tiny(run={"report": wanted, "total_steps": 1}))
    trainer.fit()
    path = trainer.folder / "report.html"
    assert path.is_file() == wanted
    facts = json.loads((trainer.folder / "environment.json").read_text())
    assert facts["processes"] == 1 and facts["device"] == "cpu"
    assert {"torch", "transformers", "accelerate", "peft", "python", "rlhf_accel"} <= set(facts["versions"])
    assert facts["machine"]["cpu"] and facts["machine"]["platform"]
    if wanted:
        assert f"report: {path}" in capsys.readouterr().out.replace("\n", "")
        assert facts["versions"]["torch"] in Page(path).text() and "ended after step 1" in Page(path).text()
