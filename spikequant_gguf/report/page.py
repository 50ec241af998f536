"""`spikequant report`: documents and a model in, one self-contained HTML page and PNGs out."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

from .. import __version__
from ..energy import count_text
from ..energy.counts import Counts
from ..errors import InputError
from ..files import atomic_path, check_writable
from ..ggml_patch.progress import Progress, SilentProgress
from ..host import default_threads, host_facts
from ..inspect_file import TensorSummary, inspect_file
from ..neuron import DEFAULT_TEXT, layer_spikes, trace_neuron
from ..perplexity import as_text
from ..texts import Text
from . import figures, spikes
from .documents import KINDS, Document, Origin, describe_host, describe_text, read_documents
from .drawing import Picture

__all__ = ["Report", "Section", "make_report"]

_TEMPLATE = "page.html.j2"
_COUNTED_TOKENS = 64
_MISSING_MODEL = "spikequant report FILES… --model MODEL-SPK4.gguf"


@dataclass
class Section:
    """A part of the page.

    Attributes:
        name, title: for the link and the heading.
        lead: a sentence under it.
        pictures, tables: shown in this order.
        missing: what is not there, with the command that makes it.
    """

    name: str
    title: str
    lead: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def add(self, picture: Picture | None) -> None:
        if picture is not None:
            self.pictures.append(picture)


@dataclass(frozen=True)
class Report:
    """A page that was written.

    Attributes:
        path: of the page. bytes: its size.
        pictures: names of the figures on it. pngs: files, if a folder was given.
        missing: what the page says it lacks.
    """

    path: str
    bytes: int
    pictures: list[str]
    pngs: list[str]
    missing: list[str]

    def to_json(self) -> dict:
        return self.__dict__.copy()


def make_report(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    model: str | Path | None = None,
    layer: str | None = None,
    neuron: str | None = None,
    text: Text | str | Path | None = None,
    prompt: str = DEFAULT_TEXT,
    png_folder: str | Path | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a page of all that is known of a model.

    Args:
        files: JSON documents of KINDS, in any order.
        model: spike model for raster, histogram, salience by layer and the table of tensors.
        layer: of the raster; the down projection in the middle of the model if None.
        neuron: ``TENSOR:ROW`` of the trace; row 0 of the layer if None.
        text: read for the shares by layer. prompt: read for raster, histogram and trace.
        png_folder: folder for the figures as PNG.
        force: replace files.

    Raises:
        InputError: nothing was given, or a document or the model is not what it should be.
        OutputError: a file cannot be written.
    """
    path = Path(out)
    check_writable(path, force)
    documents = read_documents(files)
    if not documents and model is None:
        raise InputError(
            "there is nothing to report", f"give documents, for example of `{KINDS['compare']}`, or --model"
        )
    progress = progress or SilentProgress()
    progress.step("draw", f"{len(documents)} documents")
    by_kind: dict[str, list[Document]] = {}
    for document in documents:
        by_kind.setdefault(document.kind, []).append(document)
    sections = [_accuracy(by_kind), _speed(by_kind), _energy(by_kind)]
    sections += _of_model(model, layer, neuron, text, prompt, threads, progress)
    page = _render(sections, documents, model, by_kind)
    with atomic_path(path) as partial:
        partial.write_text(page, encoding="utf-8")
    pictures = [picture for section in sections for picture in section.pictures]
    pngs = []
    if png_folder is not None:
        folder = Path(png_folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in _unique_names(pictures).items():
            target = folder / f"{name}.png"
            with atomic_path(target) as partial:
                partial.write_bytes(picture.png)
            pngs.append(str(target))
    missing = [what for section in sections for what, _ in section.missing]
    return Report(str(path), path.stat().st_size, [picture.name for picture in pictures], pngs, missing)


def _unique_names(pictures: Sequence[Picture]) -> dict[str, Picture]:
    named: dict[str, Picture] = {}
    for picture in pictures:
        name, number = picture.name, 2
        while name in named:
            name, number = f"{picture.name}-{number}", number + 1
        named[name] = picture
    return named


# ---- sections


def _accuracy(documents: dict[str, list[Document]]) -> Section:
    section = Section("accuracy", "Accuracy", "How far predictions move away from the float model's.")
    for document in (*documents.get("compare", []), *documents.get("accuracy", [])):
        section.add(figures.accuracy_of_types(document))
    for document in documents.get("sweep", []):
        section.pictures += figures.sweep_figures(document)
    for document in (*documents.get("compare", []), *documents.get("accuracy", [])):
        section.tables.append(_comparison_table(document))
    _lacks(
        section,
        documents,
        ("Types compared", ("compare", "accuracy")),
        ("Bits, salience and ablations", ("sweep",)),
    )
    return section


def _speed(documents: dict[str, list[Document]]) -> Section:
    section = Section("speed", "Speed", "Everything is measured in turns with Q4_0, on the same machine.")
    for kind, draw in (
        ("matmul", figures.matmul_batches),
        ("end_to_end", figures.end_to_end),
        ("compare", figures.compare_speeds),
        ("bench", figures.bench_speeds),
    ):
        for document in documents.get(kind, []):
            section.add(draw(document))  # type: ignore[operator]
    _lacks(
        section,
        documents,
        ("Speed of one product against batch", ("matmul",)),
        ("Speed of whole models", ("end_to_end", "bench", "compare")),
    )
    return section


def _energy(documents: dict[str, list[Document]]) -> Section:
    section = Section(
        "energy",
        "Energy",
        "Modelled from operations counted in the runtime; what was measured, or why not, stands below.",
    )
    for document in documents.get("energy", []):
        for phase in document.data["phases"]:
            section.add(figures.energy_split(document, phase))
        if not document.data.get("shape"):
            phase = document.data["phases"][0]
            section.add(figures.energy_layers(document, phase))
            section.add(figures.energy_sensitivity(document, phase))
        section.tables.append(_condition_table(document))
        if not document.data.get("shape"):  # a shape has no model to measure
            section.tables.append(_measured_table(document))
    _lacks(section, documents, ("Energy of the linear layers", ("energy",)))
    return section


def _of_model(
    model: str | Path | None,
    layer: str | None,
    neuron: str | None,
    text: Text | str | Path | None,
    prompt: str,
    threads: int | None,
    progress: Progress,
) -> list[Section]:
    found = Section(
        "spikes", "Spikes", "One layer of the real model while it reads a text; larger values fire earlier."
    )
    table = Section("tensors", "Tensors", "Every matrix of the model.")
    if model is None:
        parts = ("Spike raster", "Spike times", "A neuron's membrane potential", "Salient share by layer")
        found.missing = [(part, _MISSING_MODEL) for part in parts]
        table.missing = [("Table of tensors", _MISSING_MODEL)]
        return [found, table]
    path = Path(model)
    report = inspect_file(path)
    spiking = [tensor for tensor in report.tensors if tensor.type == "SPK4"]
    if not spiking:
        raise InputError(f"{path} has no spike-coded tensors", "give a model of `spikequant convert`")
    chosen = layer or (neuron.rpartition(":")[0] if neuron else _middle(spiking))
    progress.step("read", f"{path.name}: {chosen}")
    seen = layer_spikes(path, chosen, prompt, threads=threads)
    command = f"spikequant report --model {path.name} --layer {chosen}"
    host = describe_host(host_facts().to_json() | {"threads": threads or default_threads()})
    read = f"{prompt!r}, {len(seen.pieces)} tokens"
    last = f"inputs of the layer taken from the runtime and encoded; last token ({seen.pieces[-1]!r})"
    found.add(spikes.layer_raster(seen, Origin(last, read, command, host)))
    every = "inputs of the layer taken from the runtime and encoded; all tokens"
    found.add(spikes.layer_times(seen, Origin(every, read, command, host)))
    found.add(spikes.neuron_picture(trace_neuron(path, neuron or f"{chosen}:0", prompt, threads=threads)))
    source = as_text(text)
    progress.step("count", f"{_COUNTED_TOKENS} tokens of {source.name}")
    counts = count_text(path, source, _COUNTED_TOKENS, ("prompt",), threads)[0]["prompt"][0]
    described = describe_text(source.to_json() | {"tokens": _COUNTED_TOKENS})
    origin = Origin("counted in the runtime", described, f"spikequant report --model {path.name}", host)
    found.add(spikes.salience_by_layer(counts, origin))
    table.tables.append(_tensor_table(report.tensors, counts, origin))
    return [found, table]


def _middle(spiking: Sequence[TensorSummary]) -> str:
    """A down projection in the middle of the model, or whatever is there."""
    down = [tensor.name for tensor in spiking if "ffn_down" in tensor.name] or [spiking[0].name]
    down.sort(key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")])
    return down[len(down) // 2]


def _lacks(
    section: Section, documents: dict[str, list[Document]], *parts: tuple[str, tuple[str, ...]]
) -> None:
    """Notes the parts for which there is no document of any of the kinds."""
    for what, kinds in parts:
        if not any(kind in documents for kind in kinds):
            section.missing.append((what, KINDS[kinds[0]]))


# ---- tables: {"title", "columns", "rows", "origin", "folded", "note"}; the first column is a name


def _table(title: str, columns: Sequence[str], rows: list[list[str]], origin: Origin, **more: Any) -> dict:
    return {"title": title, "columns": list(columns), "rows": rows, "origin": origin, "folded": False} | more


def _comparison_table(document: Document) -> dict:
    rows = []
    reference = document.data.get("reference")
    for row in document.data["rows"]:
        own = row.get("name") == reference
        energy = row.get("energy") or {}
        rows.append(
            [
                row["type"].upper() if row.get("name") in (None, row["type"].upper()) else str(row["name"]),
                f"{row['bytes'] / 1e6:.1f}",
                _number(row.get("bits_per_weight"), ".2f"),
                f"{row['ppl']:.3f} ± {row['ppl_stderr']:.3f}",
                "reference" if own else f"{row['kld']:.4f} ± {row['kld_stderr']:.4f}",
                "–" if own else f"{100 * row['same_top']:.1f} %",
                _number(row.get("prompt_ratio"), ".2f"),
                _number(row.get("decode_ratio"), ".2f"),
                _number(energy.get("compute_ratio"), ".2f"),
                _number(energy.get("ratio"), ".2f"),
            ]
        )
    columns = ("type", "MB", "bits/w", "PPL", "KLD", "same top", "prompt ×", "decode ×")
    columns += ("energy ÷", "with memory ÷")
    text = None
    if document.data.get("texts"):
        text = "; ".join(filter(None, map(describe_text, document.data["texts"])))
    origin = document.origin(
        "llama-perplexity's definitions; × and ÷: relative to Q4_0, energy modelled", text
    )
    notes = " ".join(document.data.get("notes", []))
    return _table("Types compared", columns, rows, origin, note=notes)


def _condition_table(document: Document) -> dict:
    rows = []
    for phase in document.data["phases"]:
        for each in phase["conditions"]:
            system = figures.SYSTEM_NAMES[each["system"]]
            rows.append(
                [
                    f"{phase['phase']}, {each['wanted']:g} × below {system}",
                    "✓" if each["holds"] else "✗",
                    each["text"],
                ]
            )
    shape = f", {document.data['shape'].upper()} shape" if document.data.get("shape") else ""
    constants = document.data["constants"]
    origin = document.origin(f"operation model with {constants['name']}: {constants['citation']}")
    title = f"When the ratios hold, and when not{shape}"
    return _table(title, ("wanted", "holds", "condition"), rows, origin, wrap=True, folded=True)


def _measured_table(document: Document) -> dict:
    rows = []
    reasons: dict[str, list[str]] = {}
    for each in document.data["measured"]:
        if each["joules_per_token"] is None:
            what = f"{each['system'].upper()} {each['phase']}"
            reasons.setdefault(each["reason"] or "", []).append(what)
            continue
        ratio = each.get("ratio_to_q4_0")
        rows.append(
            [
                f"{each['system'].upper()} {each['phase']}",
                f"{each['joules_per_token']:.4g} ± {each['stdev']:.2g} J per token",
                f"{each['method']}, idle {each['idle_watts']:.1f} W subtracted, {each['repeats']} rounds"
                + (f"; {ratio:.2f} × below Q4_0" if ratio else ""),
            ]
        )
    rows += [[", ".join(what), "unavailable", reason] for reason, what in reasons.items()]
    origin = document.origin("counters of the machine, whole package, idle subtracted; never a constant")
    return _table("Measured", ("model and phase", "energy", "how, or why not"), rows, origin, wrap=True)


def _tensor_table(tensors: Sequence[TensorSummary], counts: Sequence[Counts], origin: Origin) -> dict:
    counted = {count.name: count for count in counts}
    rows = []
    for tensor in tensors:
        if len(tensor.shape) < 2:
            continue
        count = counted.get(tensor.name)
        inputs = count.tokens * count.n_inputs if count else 0
        rows.append(
            [
                tensor.name.removesuffix(".weight"),
                " × ".join(map(str, tensor.shape)),
                tensor.type,
                _number(tensor.bits_per_weight, ".2f"),
                _share(tensor.salient_weight_share),
                _number(tensor.relative_error, ".3f"),
                _share(count.salient / inputs if count else None),
                _share(count.silent / inputs if count else None),
                _number(count.rate_spikes / count.spikes if count and count.spikes else None, ".2f"),
            ]
        )
    columns = ("tensor", "inputs × rows", "type", "bits/w", "salient weights", "relative error")
    columns += ("salient inputs", "silent inputs", "rate ÷ TTFS spikes")
    note = "Salient weights and relative errors were recorded by the converter."
    return _table(f"{len(rows)} tensors", columns, rows, origin, folded=True, note=note)


def _number(value: float | None, layout: str) -> str:
    return "–" if value is None else format(value, layout)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


# ---- the page


def _render(
    sections: Sequence[Section],
    documents: Sequence[Document],
    model: str | Path | None,
    by_kind: dict[str, list[Document]],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spikequant_gguf.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["data_uri"] = _data_uri
    return environment.get_template(_TEMPLATE).render(
        version=__version__,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        subject=Path(model).stem if model is not None else _subject(documents),
        sources=[(document.name, document.kind) for document in documents],
        headlines=_headlines(by_kind),
        sections=sections,
    )


def _data_uri(picture: Picture) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(picture.svg.encode()).decode()


def _subject(documents: Sequence[Document]) -> str:
    for document in documents:
        reference = document.data.get("reference")
        name = (
            reference.get("name") if isinstance(reference, dict) else document.data.get("model") or reference
        )
        if name:
            return Path(str(name)).stem if "/" in str(name) else str(name)
    return "SpikeQuant"


def _headlines(by_kind: dict[str, list[Document]]) -> list[dict[str, str]]:
    """Figures for the top of the page, of the first document of each kind."""
    found = []

    def card(value: str, label: str, about: str) -> None:
        found.append({"value": value, "label": label, "about": about})

    for document in by_kind.get("compare", [])[:1]:
        rows = {row["type"]: row for row in document.data["rows"]}
        spk4, q4_0 = rows.get("spk4"), rows.get("q4_0")
        if spk4 and q4_0:
            card(f"{spk4['kld']:.3f}", "KL divergence", f"of SPK4; Q4_0 has {q4_0['kld']:.3f}")
        if spk4:
            text = describe_text(document.data["text"]) or ""
            card(f"{spk4['ppl']:.2f}", "perplexity", f"of SPK4 on {text.partition(',')[0]}")
        if spk4 and spk4.get("prompt_ratio"):
            card(f"{spk4['prompt_ratio']:.2f} ×", "prompt speed", "of Q4_0's, measured in turns")
        if spk4 and spk4.get("decode_ratio"):
            card(f"{spk4['decode_ratio']:.2f} ×", "decode speed", "of Q4_0's, measured in turns")
    for document in by_kind.get("energy", [])[:1]:
        phase = document.data["phases"][0]
        rows = {row["system"]: row for row in phase["rows"]}
        for system in ("fp16_mac", "q4_0"):
            row = rows[system]
            about = (
                f"than {figures.SYSTEM_NAMES[system]}; {row['ratio_with_memory']:.2f} × with memory; modelled"
            )
            card(f"{row['ratio']:.1f} ×", f"less energy, {phase['phase']}", about)
        card(f"{phase['counts']['rate_to_ttfs']:.1f} ×", "fewer spikes", "than rate coding, counted")
    return found
