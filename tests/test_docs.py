"""The programs and commands of docs/ run, on a tiny model; links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from test_serving import serve
from tiny_model import CHAT_TEMPLATE
from typer.testing import CliRunner

from spikequant_gguf.cli.app import app
from spikequant_gguf.ggml_patch.upstream import load_releases

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_SERVER = "http://localhost:8000/v1"


@pytest.fixture
def folder(runtime, tiny_model_factory, tiny_text: Path, tmp_path: Path, monkeypatch) -> Path:
    """The current folder of the examples, with the files that they name."""
    shutil.copy(tiny_model_factory(chat_template=CHAT_TEMPLATE), tmp_path / "model-F16.gguf")
    shutil.copy(tiny_text, tmp_path / "text.txt")
    (tmp_path / "rules.txt").write_text("ffn_up=q8_0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(line: str) -> None:
    words = shlex.split(line)
    assert words[0] == "spikequant", line
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, f"{line}: {result.output}"


def run_program(code: str, names: dict, server: str | None) -> None:
    if server is not None:
        code = code.replace(_SERVER, server)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "docs", "exec"), names)  # noqa: S102, our own examples


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page: Path, folder: Path) -> None:
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    if page.stem in ("converting", "python", "serving", "how-it-works", "installing"):
        assert blocks, f"{page.name} has no examples any more"
    with contextlib.ExitStack() as stack:
        server = None
        if any(_SERVER in block for _, block in blocks):
            run_command("spikequant convert model-F16.gguf -o model-SPK4.gguf --no-calibration")
            running = serve("--model", "model-SPK4.gguf", "--model_alias", "spikes")
            server = str(next(running).base_url)
            stack.callback(running.close)
        names: dict = {}
        for kind, block in blocks:
            if kind == "python":
                run_program(block, names, server)
            for line in block.splitlines() if kind == "console" else ():
                if line.startswith("$ "):
                    run_command(line.removeprefix("$ "))


@pytest.mark.parametrize(
    "page",
    [
        *PAGES,
        *(
            REPOSITORY / name
            for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ggml_patch/README.md")
        ),
    ],
    ids=lambda page: page.relative_to(REPOSITORY).as_posix(),
)
def test_links(page: Path) -> None:
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name) if name else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [_anchor(heading) for heading in headings], f"{page.name}: {target}"


def test_the_workflow_is_pinned_and_names_what_exists() -> None:
    text = (REPOSITORY / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    actions = re.findall(r"uses: (\S+)", text)
    assert actions and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in actions)
    named = re.findall(r"\btests/\w+\.py", text)
    assert len(named) > 10 and all((REPOSITORY / name).is_file() for name in named)
    jobs = yaml.safe_load(text)["jobs"]
    neighbours = [release.version for release in load_releases()[1:]]
    assert jobs["neighbours"]["strategy"]["matrix"]["release"] == neighbours


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
