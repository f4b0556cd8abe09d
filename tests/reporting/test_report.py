"""A report from the outputs of a whole run, and of runs that lack a part. Every text of the run is hostile."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tasks.reporting.__main__ import main
from tasks.reporting.gather import gather
from tasks.reporting.html import render_html
from tasks.reporting.page import make_sections
from tasks.reporting.results import is_better, results_frame
from tasks.reporting.samples import MAX_CHARS, cut
from tasks.reporting.terminal import result_table_text
from tasks.reporting.write import write_report
from tasks.stage import ERROR, is_done, read_artifact, read_order
from tests.reporting.conftest import HOSTILE, make_run


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.targets: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.targets.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            assert not name.startswith("on"), f"<{tag} {name}>"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_csv_holds_exactly_the_results(report_directory: Path) -> None:
    write_report(report_directory)
    assert (report_directory / "results.csv").read_text() == (
        "task,metric,base,cpt,sft\n"
        "violations,micro_f1,0.0,0.0,0.9123\n"
        "violations,nothing,,,\n"
        "domain_bpb,bits_per_byte,5.07,0.3182,0.3377\n"
        "general_bpb,bits_per_byte,0.354,0.404,0.3811\n"
        "facts,acc,0.81,0.81,0.79\n"
    )


def test_the_stage_is_finished_with_every_output(report_directory: Path) -> None:
    write_report(report_directory)
    assert is_done(report_directory)
    outputs = set(read_artifact(report_directory)["outputs"])
    assert outputs == {"results.csv", "report.md", "report.html", "cpt_curves.png", "sft_curves.png"}
    assert {p.name for p in report_directory.iterdir()} == outputs | {"order.json", "artifact.json"}


def test_differences_and_sides(report_directory: Path) -> None:
    frame = results_frame(gather(report_directory)).set_index(["task", "metric"])
    assert list(frame["side"]) == ["domain", "domain", "domain", "general", "general"]
    general = frame.loc[("general_bpb", "bits_per_byte")]
    assert general["cpt-base"] == pytest.approx(0.05)
    assert general["sft-base"] == pytest.approx(0.0271)
    assert general["sft-cpt"] == pytest.approx(-0.0229)
    assert frame.loc[("violations", "nothing")][["base", "cpt-base", "sft-cpt"]].isna().all()


def test_a_gain_is_a_gain_in_the_metrics_own_direction() -> None:
    assert is_better(0.1, True) is True and is_better(-0.1, True) is False
    assert is_better(-0.1, False) is True and is_better(0.1, False) is False
    assert is_better(0.0, True) is None and is_better(float("nan"), True) is None and is_better(1.0, None) is None


def test_html_acts_on_nothing_and_loads_nothing(report_directory: Path) -> None:
    write_report(report_directory)
    text = (report_directory / "report.html").read_text()
    page = Page(text)
    assert HOSTILE in page.text  # the hostile text got as far as the page, as text
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert page.tags.count("svg") == 2
    assert page.targets and all(re.fullmatch(r"#\S+", target) for target in page.targets)
    assert len(page.ids) == len(set(page.ids)), "two elements share an id"
    assert {target[1:] for target in page.targets} <= set(page.ids)
    assert (
        "@import" not in text
        and "url(http" not in text
        and "//" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", _style(text))
    )


def test_markdown_keeps_hostile_text_inside_fences(report_directory: Path) -> None:
    write_report(report_directory)
    inside, fence, outside = "", "", []
    for line in (report_directory / "report.md").read_text().splitlines():
        mark = re.match(r"(`{3,})(text)?$", line)
        if fence:
            inside += line
            fence = "" if line == fence else fence
        elif mark:
            fence = mark.group(1)
        else:
            outside.append(line)
    assert not fence and HOSTILE in inside
    assert not [line for line in outside if "<script" in line.replace("\\<", "")]
    assert [line for line in outside if line.startswith("# ")] == [r'# regulator \<script\>alert("x")\</script\>']


def test_markdown_tables_are_rectangular(report_directory: Path) -> None:
    write_report(report_directory)
    text = (report_directory / "report.md").read_text()
    tables = [t.splitlines() for t in re.split(r"\n\n", text) if t.startswith("| ")]
    assert len(tables) >= 9
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, table[0]


def test_the_page_says_what_a_reader_asks(report_directory: Path) -> None:
    write_report(report_directory)
    text = Page((report_directory / "report.html").read_text()).text
    for said in ("99.99%", "90.00%", "+0.003 pp", "it balances to the token", "floor 1.0e-04", "learning_rate",
                 "<|im_start|>", "transformers", "some/data at c0ffee", "abababababab data/cpt.jsonl", "3:20 of computing",
                 "sft says 0", "12 tokens, cut at 9", "data/x.jsonl:17", "0.31 pp",
                 "+0.0500 (+14.1 %)", "+0.9123"):  # fmt: skip
        assert said in text, said


def test_the_same_run_gives_the_same_page(report_directory: Path) -> None:
    run = gather(report_directory)
    first, second = (render_html("t", [], make_sections(run)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("stages", "evaluated"), [(("cpt",), True), (("sft",), True), (("cpt", "sft"), False)])
def test_a_run_without_a_part_has_a_report_too(tmp_path: Path, stages: tuple[str, ...], evaluated: bool) -> None:
    directory = make_run(tmp_path / "runs", stages, evaluated)
    write_report(directory)
    header, *rows = (directory / "results.csv").read_text().splitlines()
    assert header == "task,metric,base,cpt,sft" and len(rows) == (5 if evaluated else 0)
    text = Page((directory / "report.html").read_text()).text
    assert ("evaluates nothing" in text) is not evaluated
    terminal = result_table_text(directory)
    if evaluated:
        missing = ({"cpt", "sft"} - set(stages)).pop()
        column = ["task", "metric", "base", "cpt", "sft"].index(missing)
        assert all(row.split(",")[column] == "" for row in rows)
        assert f"{missing.upper()} \u2212 Base" not in text and missing.upper() not in terminal
    else:
        assert terminal == "nothing was evaluated"


def test_long_and_empty_answers_are_shortened() -> None:
    assert cut("yes" + "\n" * 20 + "no") == "yes\n[19 empty lines]\nno"
    assert cut("a\n\nb") == "a\n\nb"
    shown = cut("x" * (MAX_CHARS + 5))
    assert shown.startswith("x" * MAX_CHARS) and shown.endswith("[5 characters more]")


def test_terminal_table_is_aligned_and_directed(report_directory: Path) -> None:
    write_report(report_directory)
    lines = result_table_text(report_directory).splitlines()
    assert lines[0].split() == ["task", "metric", "better", "base", "CPT", "SFT", "CPT-base", "SFT-base", "SFT-CPT"]
    assert lines[2].split() == ["violations", "micro_f1", "higher", "0.0000", "0.0000", "0.9123", "+0.0000", "+0.9123",
                                "+0.9123"]  # fmt: skip
    assert lines[4].split()[2:4] == ["lower", "5.0700"]
    assert len({len(line) for line in lines}) == 1 and all(line.isascii() for line in lines)


def test_worker_writes_once_and_reuses(report_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(report_directory) == 0
    written = (report_directory / "artifact.json").stat().st_mtime_ns
    assert "[steep] report        done" in capsys.readouterr().out
    assert main(report_directory) == 0
    assert (report_directory / "artifact.json").stat().st_mtime_ns == written


def test_a_directory_without_an_order_is_told(tmp_path: Path) -> None:
    assert main(tmp_path) == 2
    assert "no stage's directory" in (tmp_path / ERROR).read_text()


def test_a_stage_that_is_not_finished_is_told(report_directory: Path) -> None:
    sft = Path(json.loads((report_directory / "order.json").read_text())["inputs"]["sft"])
    (sft / "artifact.json").unlink()
    assert main(report_directory) == 2
    assert "the report reads sft, which is not finished" in (report_directory / ERROR).read_text()
    assert not (report_directory / "report.html").exists()


def test_an_unbalanced_ledger_is_not_called_balanced(report_directory: Path) -> None:
    prepared = Path(json.loads((report_directory / "order.json").read_text())["inputs"]["prepare_cpt"])
    ledger = json.loads((prepared / "ledger.json").read_text())
    (prepared / "ledger.json").write_text(json.dumps(ledger | {"balanced": False}))
    write_report(report_directory)
    assert "does NOT balance" in (report_directory / "report.html").read_text()


def _style(text: str) -> str:
    """The page's own style sheet."""
    return text[text.index("<style>") : text.index("</style>")]


def test_models_in_bf16_are_told_and_more_so_beside_others_in_float32(tmp_path: Path) -> None:
    directory = make_run(tmp_path)

    def said(*roles: str) -> str:
        run = gather(directory)
        for role in roles:
            run.evaluation(role).counts["dtype"] = "bfloat16"
        return render_html("title", [], make_sections(run))

    assert "Evaluated in bfloat16" not in said()
    assert "did not fit the GPU: Base, CPT, SFT." in said("base", "cpt", "sft")
    text = said("base", "cpt", "sft"), said("sft")
    assert "The others were in float32" not in text[0] and "GPU: SFT. The others were in float32" in text[1]


def test_a_result_that_no_name_of_the_run_brought_is_put_on_no_side(report_directory: Path) -> None:
    path = Path(read_order(report_directory).inputs["evaluate_base"]) / "results.json"
    results = json.loads(path.read_text())
    results["asked"]["facts"] = "nobody"
    path.write_text(json.dumps(results))
    with pytest.raises(KeyError, match="nobody"):
        results_frame(gather(report_directory))
