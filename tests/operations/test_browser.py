"""In a real browser: start a run from the deployment's form, watch it finish, open artifacts and report.

Chromium is the system's (Debian: apt-get install chromium), driven through Playwright. Screenshots stand in
.screenshots/ afterwards, to be looked at.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, laws, write_lines
from tests.operations.conftest import Served, wait_for

pytestmark = [pytest.mark.operations, pytest.mark.timeout(1800)]  # the first test also waits for the server and a run
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
SCREENSHOTS = ROOT / ".screenshots"
CONFIG = "configs/form.yaml"


@pytest.fixture(scope="module")
def page(served: Served) -> Iterator[Any]:
    """A page of the UI that notes every address it asks for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="make test-operations installs it")
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path: apt-get install chromium")
    SCREENSHOTS.mkdir(exist_ok=True)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(30_000)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        yield page
        browser.close()


def test_a_run_from_the_form_to_the_report(served: Served, first_run: str, page: Any) -> None:
    assert first_run  # before this one, so that it computes everything; both have one base model
    text = (served.project / "configs/regulator.yaml").read_text()
    (served.project / CONFIG).write_text(text.replace("seed: 0", "seed: 3"))

    deployment = served.api("/deployments/name/pipeline/cpu")["id"]
    page.goto(f"{served.url}/deployments/deployment/{deployment}")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    form = page.locator("form")
    form.get_by_text("A tag of configs/hardware.yaml").wait_for()
    shoot(page, "1-form")
    page.locator("textarea").first.fill(CONFIG)
    shoot(page, "2-form-filled")
    page.get_by_role("button", name="Submit").click()

    wanted = {"flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED"]}}}}
    found = wait_for(
        lambda: [r for r in served.api("/flow_runs/filter", wanted) if r["parameters"]["config"] == CONFIG]
    )
    [run] = found
    page.goto(f"{served.url}/runs/flow-run/{run['id']}")
    page.get_by_text(re.compile(r"prepare_cpt\s+runs: .*seed")).wait_for(timeout=120_000)  # log lines, live
    wait_for(lambda: "cpt-progress" in served.artifacts(run["id"]), 180)
    page.get_by_text("Running", exact=True).first.wait_for()
    shoot(page, "3-running")
    assert served.wait_for_run(run["id"])["state_name"] == "Completed"
    page.reload()
    page.get_by_text("6 Task runs").wait_for()
    page.wait_for_timeout(3000)  # the graph is drawn
    shoot(page, "4-finished")

    shown = served.artifacts(run["id"])
    for number, key in enumerate(("plan", "cpt-progress", "prepare-cpt-ledger", "cpt-loss", "results"), start=5):
        page.goto(f"{served.url}/artifacts/artifact/{shown[key]['id']}")
        page.get_by_text(key).first.wait_for()
        page.wait_for_timeout(1500)
        shoot(page, f"{number}-{key}")
        if key == "cpt-loss":
            picture = page.get_by_role("img", name="loss over steps")
            assert picture.evaluate("image => image.naturalWidth") > 300  # it was drawn
    page.goto(f"{served.url}/artifacts/artifact/{shown['report']['id']}")
    link = page.get_by_role("link", name=re.compile("report.html"))
    link.wait_for()
    page.goto(link.get_attribute("href"))
    assert "tiny_bpb" in page.locator("body").inner_text()
    shoot(page, "10-report")


def test_a_run_is_cancelled_with_the_button(served: Served, first_run: str, page: Any) -> None:
    """Its processes are gone within 15 s, and it shows as Cancelled."""
    assert first_run
    write_lines(served.project / "many.jsonl", laws(6000))
    write_lines(served.project / "much.jsonl", [{"text": f"The river of town {n} is {n} miles."} for n in range(4000)])
    text = (served.project / "configs/regulator.yaml").read_text()
    for short, long in {"laws*.jsonl": "many.jsonl", "general.jsonl": "much.jsonl", "tokens: 4096": "tokens: 65536",
                        "batch_tokens: 512": "batch_tokens: 64"}.items():  # fmt: skip
        assert short in text
        text = text.replace(short, long, 1)
    (served.project / "configs/long.yaml").write_text(text)
    run = served.start_run(config="configs/long.yaml", until="cpt")
    wait_for(lambda: "cpt-progress" in served.artifacts(run), 180)
    assert trainers(served)
    page.goto(f"{served.url}/runs/flow-run/{run}")
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.wait_for_timeout(1000)  # it slides in
    shoot(page, "12-cancel")
    began = time.monotonic()
    page.get_by_role("button", name="Confirm").click()
    wait_for(lambda: served.api(f"/flow_runs/{run}")["state_name"] == "Cancelled", 60)
    took = time.monotonic() - began
    page.get_by_text("Cancelled", exact=True).first.wait_for()
    shoot(page, "13-cancelled")
    assert took < 15, f"it took {took:.0f} s"
    wait_for(lambda: not trainers(served), 15 - took)


def trainers(served: Served) -> list[int]:
    """Processes of trainings, and their guards, below `make serve`."""
    found = []
    for process in psutil.Process(served.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process.pid] if "tasks.training" in process.cmdline() else []
    return found


def test_the_form_refuses_a_wrong_value(served: Served, page: Any) -> None:
    deployment = served.api("/deployments/name/pipeline/cpu")["id"]
    page.goto(f"{served.url}/deployments/deployment/{deployment}/run")
    page.locator("textarea").first.fill("../outside.yaml")
    page.get_by_role("button", name="Submit").click()
    page.get_by_text(re.compile("a YAML file below the project, as configs/regulator.yaml")).first.wait_for()
    page.wait_for_timeout(1000)  # it slides in
    shoot(page, "11-refused")


def test_the_ui_asks_nobody_but_our_server(served: Served, page: Any) -> None:
    assert len(page.asked) > 50  # it did ask
    ours = ("http://127.0.0.1:", "data:", "blob:")
    assert [address for address in page.asked if not address.startswith(ours)] == []


def shoot(page: Any, name: str) -> None:
    page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)
