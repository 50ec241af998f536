"""The page of a report: complete, self-contained, readable on a phone; in a browser where there is one."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest
from browser import browser, find_browser
from typer.testing import CliRunner

from spikequant_gguf.cli import app
from spikequant_gguf.compare import compare
from spikequant_gguf.console import to_json_text
from spikequant_gguf.energy import energy
from spikequant_gguf.errors import InputError, OutputError
from spikequant_gguf.neuron import trace_neuron
from spikequant_gguf.neuron_file import write_neuron
from spikequant_gguf.report import make_report
from spikequant_gguf.report.documents import KINDS, read_document
from spikequant_gguf.speed import speed

HOST = {"cpu": "Some CPU <&>", "threads": 2, "os": "Linux 6", "kernel": "avx2", "spikequant": "0.1.0"}


def sweep_document() -> dict:
    """What `spikequant sweep --json` says, with a long name and a missing value here and there."""
    points = []
    for bits in range(1, 7):
        points.append({"study": "bits", "name": f"W{bits}A{bits}", "series": "W = A", "weight_bits": bits})
        points[-1] |= {"activation_bits": bits, "kld": 16.0 / 4 ** (bits - 1), "kld_stderr": 0.01}
    for share in (0.0, 0.05, 0.2):
        points.append(
            {"study": "salience", "name": f"{share:.0%}", "series": "top share", "kld": 0.5 - share}
        )
        points[-1] |= {"salient_share": share, "kld_stderr": None}
    for study, names in (("ablations", ("all parts", "no rotation")), ("baselines", ("SpikeQuant", "Atom"))):
        points += [{"study": study, "name": name, "series": "", "kld": 0.1} for name in names]
    points.append({"study": "ablations", "name": "collapsed", "series": "", "kld": None})
    text = {"name": "wiki.test.raw", "sha256": "4f3e427e0000", "chunks": 8, "ctx": 512}
    return {
        "reference": {"name": "SmolLM2-F16", "sha256": "ab"},
        "text": text,
        "host": HOST,
        "command": "spikequant sweep SmolLM2-F16.gguf --chunks 8",
        "points": points,
    }


def matmul_document() -> dict:
    rows = []
    for tokens in (1, 8, 64):
        for shape in (576, 4096):
            row = {"rows": shape, "inputs": shape, "tokens": tokens, "threads": 2, "isa": "avx2"}
            ratio = {"ratio_q4_0": 1.5, "ratio_q4_0_min": 1.4, "ratio_q4_0_max": 1.7}
            rows += [row | ratio | {"type": "spk4", "silent_target": 0.15}]
            rows += [row | {"type": "q4_0", "ratio_q4_0": 1.0}]
    return {"benchmark": "matmul", "arguments": ["--quick"], "host": HOST, "rows": rows}


def end_to_end_document() -> dict:
    rows = [
        {"model": model, "type": kind, "threads": 2, "pp_ratio": ratio, "tg_ratio": ratio / 2}
        for model in ("smollm2", "7b")
        for kind, ratio in (("q4_0", 1.0), ("spk4", 1.3))
    ]
    settings = {"rounds": 3, "n_prompt": 512, "n_gen": 64}
    return {"benchmark": "end_to_end", "arguments": [], "host": HOST, "settings": settings, "rows": rows}


@pytest.fixture(scope="module")
def documents(
    tiny_models: dict[str, Path], tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Real documents of the small model, and made ones of what takes long."""
    folder = tmp_path_factory.mktemp("documents")
    models = [tiny_models[kind] for kind in ("f16", "q4_0", "spk4")]
    q4_0, spk4 = models[1:]
    made = {
        "compare": compare(
            models, tiny_text, ctx=64, chunks=2, rounds=1, prompt=16, decode=2, threads=1
        ).to_json(),
        "energy": energy([spk4, q4_0], tiny_text, tokens=24, threads=1, measuring=False).to_json(),
        "shape": energy(spk4, tiny_text, tokens=24, shape="7b", threads=1).to_json(),
        "bench": speed([q4_0, spk4], q4_0, prompt=16, decode=2, rounds=2, threads=1).to_json(),
        "sweep": sweep_document(),
        "matmul": matmul_document(),
        "end_to_end": end_to_end_document(),
    }
    made["accuracy"] = {"benchmark": "accuracy", "arguments": [], "host": HOST, "reference": "F16"} | {
        "texts": [{"name": "tiny.txt", "chunks": 2, "ctx": 64}],
        "rows": [row | {"text": "tiny.txt", "model": "tiny"} for row in made["compare"]["rows"]],
    }
    paths = {}
    for name, document in made.items():
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(to_json_text(document), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def full_page(
    documents: dict[str, Path],
    tiny_models: dict[str, Path],
    tiny_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("page")
    made = make_report(
        list(documents.values()),
        folder / "report.html",
        model=tiny_models["spk4"],
        text=tiny_text,
        prompt="the spike was on",
        png_folder=folder / "pictures",
        threads=1,
    )
    assert made.missing == []
    assert len(made.pngs) == len(made.pictures) == 20
    return folder / "report.html"


class Page(html.parser.HTMLParser):
    """What a page refers to, its figures, and whether every element is closed."""

    VOID = frozenset(("meta", "link", "img", "br", "input"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.images: list[dict[str, str]] = []
        self.captions: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.references += [values[name] for name in ("src", "href", "srcset", "data") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        assert tag not in ("script", "iframe", "object", "embed")
        if tag == "img":
            self.images.append(values)
        if tag == "figcaption":
            self.captions.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "figcaption" in self.open:
            self.captions[-1] += data


def test_page_is_complete_in_itself(full_page: Path) -> None:
    text = full_page.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.images) == len(page.captions) == 20
    for reference in page.references:
        assert reference.startswith(("data:", "#")), reference[:80]
    assert {each[1:] for each in page.references if each.startswith("#")} <= set(page.ids)
    assert not re.search(r"@import|url\(", text)
    for image in page.images:
        assert len(image["alt"]) > 20
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        xml.etree.ElementTree.fromstring(base64.b64decode(data))
    assert len(text) < 4_000_000
    assert '<meta name="viewport"' in text


def test_every_figure_says_where_it_is_from(full_page: Path) -> None:
    for caption in Page(full_page.read_text(encoding="utf-8")).captions:
        for what in ("Method", "Text", "Command", "Host"):
            assert what in caption, caption
    pngs = list((full_page.parent / "pictures").glob("*.png"))
    assert len(pngs) == 20
    for png in pngs:
        data = png.read_bytes()
        assert data.startswith(b"\x89PNG") and b"Method:" in data and b"Host:" in data


def test_page_tells_what_it_was_made_from(full_page: Path, documents: dict[str, Path]) -> None:
    text = full_page.read_text(encoding="utf-8")
    assert "Some CPU &lt;&amp;&gt;" in text and "Some CPU <&>" not in text
    assert "spikequant sweep SmolLM2-F16.gguf --chunks 8" in text
    assert "python benchmarks/matmul.py --quick" in text
    assert "not asked for (--no-measure)" in text  # why nothing was measured
    assert "blk.1.attn_output" in text  # a row of the table of tensors
    assert "Only the shape is of 7b" in text
    for path in documents.values():
        assert path.name in text


def test_missing_parts_are_named(documents: dict[str, Path], tmp_path: Path) -> None:
    made = make_report([documents["bench"]], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert set(made.missing) >= {
        "Types compared",
        "Energy of the linear layers",
        "Spike raster",
        "Table of tensors",
    }
    assert "Speed of whole models" not in made.missing
    for what in made.missing:
        assert f"Not in this report: <b>{what.replace(chr(39), '&#39;')}</b>" in text
    assert "spikequant compare MODEL --json" in text
    Page(text)


def test_kinds_are_recognized(documents: dict[str, Path]) -> None:
    found = {name: read_document(path).kind for name, path in documents.items()}
    assert found.pop("shape") == "energy"
    assert found == {name: name for name in found} and set(found) == set(KINDS)


def test_wrong_documents(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    out = tmp_path / "report.html"
    for content, message in (
        ("{", "no JSON"),
        ("[1]", "no kind"),
        ('{"rows": []}', "no kind"),
        ("\xff", "no JSON"),
    ):
        (tmp_path / "odd.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(InputError, match=message):
            make_report([tmp_path / "odd.json"], out)
    with pytest.raises(InputError, match="cannot read"):
        make_report([tmp_path / "none.json"], out)
    with pytest.raises(InputError, match="nothing to report"):
        make_report([], out)
    with pytest.raises(InputError, match="no spike-coded tensors"):
        make_report([], out, model=tiny_models["q4_0"])
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        make_report([], out, model=tiny_models["spk4"])
    assert out.read_text() == "mine"


def test_command(documents: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["report", str(documents["energy"]), "-o", str(tmp_path / "page.html")]
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert "energy-prompt" in document["pictures"] and "Spike raster" in document["missing"]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == OutputError.exit_code and "exists already" in again.output
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(full_page: Path, tiny_models: dict[str, Path], tmp_path: Path, width: int) -> None:
    """No sideways scrolling, no complaint, nothing asked of the network. Where no browser is, by parsing."""
    pages = [full_page, tmp_path / "neuron.html"]
    write_neuron(trace_neuron(tiny_models["spk4"], "blk.1.ffn_down:5", "the spike was on"), pages[1])
    program = find_browser()
    if program is None:
        for page in pages:  # nothing in it is wider than a phone unless it scrolls by itself
            text = page.read_text(encoding="utf-8")
            assert "width=device-width" in text and not re.search(r"min-width:\s*[4-9]\d\d", text)
            assert text.count("<table") == text.count('class="scroll"')
        return
    with browser(program, tmp_path / "profile") as shown:
        for page in pages:
            shown.open(page, width)
            assert shown.evaluate("innerWidth") == width
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            assert shown.evaluate(
                "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
            )
            shown.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            assert shown.messages == []
            assert [each for each in shown.requests if not each.startswith(("file:", "data:"))] == []
            shown.screenshot(tmp_path / "shot.png")
            assert (tmp_path / "shot.png").stat().st_size > 10_000
