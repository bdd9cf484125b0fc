"""JupyterLab and formgrader as people see them: a real server, headless Chromium, screenshots to look at."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import pytest
from nbconvert import HTMLExporter

from grading import build, gradebook
from grading.pipeline import Settings
from grading.workspace import ROOT, repository
from tests.fixtures import small_course as small
from tests.fixtures.hostile import HOSTILE_MARKDOWN, HOSTILE_OUTPUTS

CHROMIUM = shutil.which("chromium")
QUIET = ("--no-sandbox", "--disable-gpu")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
SHOTS = ROOT / "screenshots"
HAS_RUN = """(index) => {
    const prompt = document.querySelector(`.jp-CodeCell[data-windowed-list-index="${index}"] .jp-InputPrompt`);
    return prompt !== null && /\\[\\d+\\]/.test(prompt.textContent);
}"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="there is no chromium on the PATH (Debian: apt install chromium)"
    ),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A course of one shortened lesson, with one graded submission whose written answer waits for a marker."""
    workspace = small.workspace_in(tmp_path_factory.mktemp("lab"))
    small.author(workspace, small.WRITTEN, small.written_notebook())
    build.build(workspace, [small.WRITTEN])
    release = nbformat.read(workspace.release(small.WRITTEN), as_version=4)
    answer = {"s1_judgement": "The slide names no norm.", "s1_predict": small.PREDICTION}
    small.hand_in(workspace, "essayist", small.filled(release, answer), small.WRITTEN)
    small.author(workspace, small.LESSON, small.source_notebook())
    build.build(workspace, [small.LESSON])
    hostile = nbformat.read(workspace.release(small.LESSON), as_version=4)
    own = [nbformat.v4.new_markdown_cell(source) for source in HOSTILE_MARKDOWN.values()]
    hostile.cells += [*own, nbformat.v4.new_code_cell(HOSTILE_OUTPUTS)]
    small.hand_in(workspace, "mallory", hostile)
    small.graded(workspace, [small.WRITTEN, small.LESSON], Settings())
    return workspace


@pytest.fixture(scope="module")
def lab(workspace):
    """The address of a JupyterLab with nbgrader's extension on that course, by token."""
    home = workspace.private.parent
    folders = [workspace.solutions, workspace.course, workspace.submitted, workspace.private]
    (home / "nbgrader_config.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom grading.gradebook import settings\nfrom grading.workspace import Workspace\n"
        f"c = get_config()\nc.merge(settings(Workspace(*map(Path, {list(map(str, folders))!r}))))\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = {
        name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
    }
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"),
                *(
                    f"--IdentityProvider.token={token}",
                    f"--ServerApp.root_dir={home}",
                    "--ServerApp.port_retries=0",
                ),
                *("--LabApp.news_url=None", "--allow-root"),
            ],
            cwd=home,
            env=os.environ | own | {"JUPYTER_RUNTIME_DIR": str(home / "runtime"), "ROBUSTKIT_TIER": "smoke"},
            stdout=log,
            stderr=log,
        )
        address = f"http://127.0.0.1:{port}"
        try:
            _wait_until_up(server, f"{address}/api/status?token={token}", home / "lab.log")
            yield address, token
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_until_up(server, url, log):
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.25)
    raise AssertionError(log.read_text()[-2000:])


@pytest.fixture
def page():
    from playwright.sync_api import sync_playwright

    SHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *OFFLINE])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def run_up_to(page, notebook, grade_id):
    """Run the notebook's cells one by one, as with Shift+Enter, up to the one with this nbgrader id."""
    active = '.jp-Cell.jp-mod-active[data-windowed-list-index="{}"]'
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")
    page.wait_for_selector('.jp-Cell[data-windowed-list-index="2"]')  # at first only one cell is drawn
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.wait_for_selector(active.format(0))
    for index, cell in enumerate(notebook.cells):
        page.keyboard.press("Shift+Enter")
        page.wait_for_selector(active.format(index + 1))
        if cell.cell_type == "code":  # one after the other: a cell that fails takes the queue with it
            page.wait_for_function(HAS_RUN, arg=index)
        if cell.metadata.get("nbgrader", {}).get("grade_id") == grade_id:
            return
    raise AssertionError(f"the release has no cell {grade_id}")


def test_a_learner_sees_the_hint_of_the_check(lab, workspace, page):
    """The real lesson 1 in JupyterLab: an untouched exercise is checked, and told what is missing."""
    address, token = lab
    lesson = small.WRITTEN
    learner = workspace.private.parent / "learner"
    build.build(repository_into(learner), [lesson])
    notebook = nbformat.read(learner / "course" / lesson / f"{lesson}.ipynb", as_version=4)
    page.goto(f"{address}/lab/tree/learner/course/{lesson}/{lesson}.ipynb?token={token}")
    run_up_to(page, notebook, "s1_predict_check")
    hint = page.get_by_text("PREDICTION_MISSING")
    hint.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "lab-hint.png")
    assert hint.is_visible()
    assert "0 of 1 points on the visible check" in page.locator(".jp-Notebook").inner_text()


def repository_into(folder):
    """This clone's sources, built into a folder of the test's own."""
    clone = repository()
    return type(clone)(clone.solutions, folder / "course", folder / "submitted", folder / "private")


def test_a_marker_finds_the_answer_in_formgrader_and_marks_it(lab, workspace, page):
    address, token = lab
    page.goto(f"{address}/formgrader?token={token}")
    page.get_by_role("link", name=small.WRITTEN).first.wait_for()
    page.screenshot(path=SHOTS / "formgrader-list.png")

    page.goto(f"{address}/formgrader/gradebook/{small.WRITTEN}/{small.WRITTEN}")
    page.get_by_role("link", name="Submission #1").click()
    answer = page.get_by_text("The slide names no norm.")
    answer.wait_for()
    assert page.get_by_text("Two points for each gap").is_visible()
    answer.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "formgrader-answer.png")

    assert page.get_by_text("essayist").count() >= 1  # marked without a name, until one asks for it
    assert not any(name.is_visible() for name in page.get_by_text("essayist").all())

    box = page.locator("input#s1_judgement")
    box.fill("7.5")
    with page.expect_response(lambda response: "/formgrader/api/grade/" in response.url) as saved:
        box.press("Tab")
    assert saved.value.ok
    row = next(row for row in gradebook.rows(workspace) if row.student == "essayist")
    assert (row.points, row.needs_marking) == (8.5, False)
    page.screenshot(path=SHOTS / "formgrader-marked.png")


# --- hostile notebooks -------------------------------------------------------------------------------------


@pytest.fixture
def canaries(page):
    """What sang in the page: calls of `canary`, dialogs, requests to another host; empty where nothing acted."""
    sang = []
    page.expose_function("canary", lambda *_: sang.append("script"))
    page.on("dialog", lambda dialog: (sang.append("dialog"), dialog.dismiss()))
    page.on("request", lambda request: "evil.example" in request.url and sang.append(request.url))
    return sang


def provoke(page):
    """Do to the page what a curious marker does: point at everything, and click on every link to nowhere."""
    for link in page.locator("a[href^='javascript'], a[href^='data'], [onclick]").all():
        link.dispatch_event("click")
    for element in page.locator("[onmouseover], [onload], [onerror]").all():
        element.dispatch_event("mouseover")
    page.wait_for_timeout(1000)


def test_a_hostile_notebook_does_not_act_in_formgrader(lab, page, canaries):
    address, token = lab
    page.goto(f"{address}/formgrader?token={token}")
    page.goto(f"{address}/formgrader/gradebook/{small.LESSON}/{small.LESSON}")
    page.get_by_role("link", name="Submission #1").click()
    page.get_by_text("is not shown").first.wait_for()
    provoke(page)
    page.get_by_text("<script>canary()</script>").first.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "formgrader-hostile-markdown.png")
    page.get_by_text("is not shown").first.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "formgrader-hostile-outputs.png")
    assert canaries == []
    assert page.locator("#notebook-container :is(img, svg, iframe, script, form, style)").count() == 0
    assert page.locator("#notebook-container input").count() == 2 * 3  # formgrader's own, two an exercise


def test_a_hostile_notebook_does_not_act_on_its_feedback_page(workspace, page, canaries):
    page.goto(workspace.page("mallory", small.LESSON).as_uri())
    page.get_by_role("heading", name="Feedback").first.wait_for()
    provoke(page)
    page.screenshot(path=SHOTS / "feedback-hostile.png", full_page=True)
    assert canaries == []
    assert page.locator("script, img, svg, iframe").count() == 0


def test_the_same_notebook_acts_where_nothing_is_done_about_it(workspace, page, canaries, tmp_path):
    """The canaries can sing: nbconvert's plain page of the same cells."""
    cells = [nbformat.v4.new_markdown_cell(source) for source in HOSTILE_MARKDOWN.values()]
    html, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=cells))
    (tmp_path / "plain.html").write_text(html)
    page.route("https://**", lambda route: route.abort())
    page.goto((tmp_path / "plain.html").as_uri(), wait_until="commit")
    provoke(page)
    assert "script" in canaries
    assert any("evil.example" in what for what in canaries)
