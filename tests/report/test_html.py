"""report.html: what it shows, that nothing in it can run, and that it reads nothing outside the run."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlprune.errors import RequestError
from vlprune.report import html, scales
from vlprune.report.html import render_html
from vlprune.report.manifest import verify_manifest, write_manifest
from vlprune.report.schema import validate_report
from vlprune.report.write import write_report


VOID = {"meta", "link", "img", "wbr"}
HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}\u202e\x00"


class Page(HTMLParser):
    """Elements with their attributes, and the text; every element that was opened must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.text += "" if tag == "wbr" else " "
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page(report: dict[str, Any], folder: Path | None = None, samples: bool = True) -> Page:
    return Page(render_html(validate_report(report), folder, samples))


def texts(found: Page) -> str:
    return " ".join(found.text.split()).replace(" ,", ",")


# --- content ----------------------------------------------------------------------------------------------------------


def test_everything_is_shown(rich: dict[str, Any], run: Path) -> None:
    found = page(rich, run)
    text = texts(found)
    sections = [attributes["id"] for attributes in found.all("h2")]
    assert sections == [
        "verdict", "notes", "accuracy", "ratios", "size", "speed", "sparsity", "samples", "tables", "environment",
    ]  # fmt: skip
    assert {link["href"] for link in found.all("a")} <= {f"#{name}" for name in sections}
    assert "vqa, accuracy 98.5 95.0 −3.5 intervals apart" in text  # at a glance
    assert "packed fp32, cpu: faster in 1 (2.10 ×), slower in 1 (0.80 ×)" in text
    assert "multiflow-0.9, fine-tuned PyTorch" in text and "95.0 [93.0, 97.0]" in text
    assert "25.0 % 1.05 MB of 4.20 MB" in text
    assert "do not make standard ONNX operators faster" in text
    assert "0.800 [0.780, 0.820] slower 10.00 → 12.50 ms" in text
    assert "fine-tuned models disagree on 3 of the first 200 test samples" in text
    assert "ratios: - 0.9" in text and "Some | processor, 2 threads" in text


def test_samples_stand_side_by_side(rich: dict[str, Any], run: Path) -> None:
    text = texts(page(rich, run))
    # Right answers are joined; of one variant the packed graphs disagree, so that its runtimes are named.
    assert (
        "what color is it? expected: red Outputs of sample 0 models output "
        "dense, fine-tuned multiflow-0.9, fine-tuned PyTorch red right "
        "multiflow-0.9 blue wrong "
        "multiflow-0.9, fine-tuned ONNX, cpu, packed fp32 green 30 % right"
    ) in text
    assert "right one at rank 4" in text and "image for: a red circle" in text
    images = [attributes["src"] or "" for attributes in page(rich, run).all("img")]
    assert len(images) == 4 and all(source.startswith("data:image/jpeg;base64,/9j/") for source in images)


def test_samples_can_be_left_out(rich: dict[str, Any], run: Path) -> None:
    found = page(rich, run, samples=False)
    assert found.all("img") == [] and "what color" not in found.text and 'href="#samples"' not in found.text


def test_random_weights_show_no_accuracy(rich: dict[str, Any], run: Path) -> None:
    rich["model"]["random_weights"] = True
    rich |= {"metrics": [], "samples": []}
    found = page(rich, run)
    assert "The weights are random" in found.text
    assert not {"accuracy", "ratios", "samples"} & {attributes["id"] for attributes in found.all("h2")}


def test_an_old_report_and_one_of_a_single_stage(report: dict[str, Any]) -> None:
    """Without samples, modalities, folder; then without nearly everything."""
    assert "all layers" in page(report).text
    for section in ("variants", "metrics", "graphs", "throughput", "stages"):
        report[section] = []
    assert [attributes["id"] for attributes in page(report).all("h2")] == ["environment"]


def test_losses_are_shown_as_losses(rich: dict[str, Any], run: Path) -> None:
    found = page(rich, run)
    marks = [attributes["class"] for attributes in found.all("svg") if "mark" in (attributes.get("class") or "")]
    assert {"mark slower", "mark faster", "mark alike", "mark disturbed"} <= set(marks)
    rich["graphs"][0]["bytes"] = 8_400_000
    assert "larger" in {attributes.get("class") for attributes in page(rich, run).all("rect")}


def test_the_heat_map_has_a_cell_per_layer(rich: dict[str, Any]) -> None:
    found = page(rich)
    cells = [attributes for attributes in found.all("td") if re.fullmatch("h[0-6]", attributes.get("class") or "")]
    layers = rich["variants"][2]["sparsity"]["per_layer"]
    assert sorted(str(cell["title"]) for cell in cells) == sorted([*layers, *layers])  # of both ratios
    assert "vision: 90.00 % removed" in found.text


def test_the_same_report_gives_the_same_page(rich: dict[str, Any], run: Path) -> None:
    assert render_html(rich, run) == render_html(copy.deepcopy(rich), run)  # type: ignore[arg-type]


# --- security ---------------------------------------------------------------------------------------------------------


def spoil(value: Any) -> Any:
    """Put markup into every text that may be any text."""
    free = {"name", "family", "checkpoint", "dataset", "question", "text", "cpu", "gpu", "python", "graph", "method"}
    if isinstance(value, dict):
        return {key: HOSTILE if key in free and isinstance(item, str) else spoil(item) for key, item in value.items()}
    if isinstance(value, list):
        return [HOSTILE if item == "red" else spoil(item) for item in value]
    return value


def test_hostile_texts_stay_texts(rich: dict[str, Any], run: Path) -> None:
    rich["model"]["modalities"] = dict.fromkeys(rich["model"]["modalities"], HOSTILE)
    clean = page(rich, run)
    (run / "recipe.yaml").write_text(HOSTILE)
    spoiled = page(spoil(rich), run)
    assert {tag for tag, _ in spoiled.elements} == {tag for tag, _ in clean.elements}
    assert len(spoiled.all("img")) == len(clean.all("img"))
    assert "<script>alert(1)</script>" in spoiled.text and "49" not in spoiled.text.replace("0.49", "")
    assert not any("\u202e" in text or "\x00" in text for text in (spoiled.text, str(spoiled.elements)))
    for tag, attributes in spoiled.elements:
        assert tag != "script" and not any(name.startswith("on") or name == "style" for name in attributes), tag


def test_the_policy_allows_nothing_but_its_own_style(rich: dict[str, Any], run: Path) -> None:
    found = page(rich, run)
    (policy,) = [m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'sha256-[\w+/=]+'; base-uri 'none'; form-action 'none'", policy
    )
    for _, attributes in found.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))


@pytest.mark.parametrize("case", ["link", "absolute", "text", "large", "missing"])
def test_images_come_from_the_run_only(rich: dict[str, Any], run: Path, tmp_path: Path, case: str) -> None:
    image = run / "samples" / "vqa" / "0.jpg"
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(image.read_bytes())
    image.unlink()
    if case == "link":
        image.symlink_to(secret)
    elif case == "text":
        image.write_text("<svg onload=alert(1)>")
    elif case == "large":
        image.write_bytes(html.JPEG + bytes(html.MAX_IMAGE))
    elif case == "absolute":
        rich["samples"][0]["images"] = [str(secret)]
        with pytest.raises(RequestError, match="names an image outside the run directory"):
            validate_report(rich)
    found = Page(render_html(rich, run))  # type: ignore[arg-type]
    assert len(found.all("img")) == 3 and "no image" in found.text


def test_half_characters(rich: dict[str, Any], run: Path) -> None:
    rich["model"]["name"] = "half \ud800"
    render_html(rich, run).encode()  # type: ignore[arg-type]


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_run_is_rendered_again(rich: dict[str, Any], run: Path, tmp_path: Path) -> None:
    (run / "report.json").write_text(json.dumps(rich))
    (run / "report.html").write_text("old")
    write_manifest(run, 0)
    assert write_report(run) == run / "report.html"
    assert (run / "report.html").read_text() == render_html(rich, run)  # type: ignore[arg-type]
    verify_manifest(run)
    shared = write_report(run / "report.json", tmp_path / "shared.html", samples=False)
    assert "data:image" not in shared.read_text()
    assert write_report(run, tmp_path / "report.md").read_text().startswith("# Compression of blip-tiny\n")
    verify_manifest(run)


def test_what_cannot_be_rendered(rich: dict[str, Any], run: Path) -> None:
    for output, says in (("report.txt", "neither .html nor .md"), ("samples", "neither"), ("x.html", "is a folder")):
        (run / "x.html").mkdir(exist_ok=True)
        with pytest.raises(RequestError, match=says):
            write_report(run, run / output)
    with pytest.raises(RequestError, match="no such file"):
        write_report(run)
    rich["extra"] = 1
    (run / "report.json").write_text(json.dumps(rich))
    with pytest.raises(RequestError, match="extra is unknown"):
        write_report(run)
    assert not (run / "report.html").exists()


# --- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "floor", "ticks"),
    [
        ((0, 100), 0, (0, 20, 40, 60, 80, 100)),
        ((93, 97.5), 0, (93, 94, 95, 96, 97)),
        ((5, 5), None, (4.9, 4.95, 5, 5.05, 5.1)),
        ((0, 0), 0, (0, 0.002, 0.004, 0.006, 0.008, 0.01)),
    ],
)
def test_linear_ticks(values: tuple[float, ...], floor: float | None, ticks: tuple[float, ...]) -> None:
    scale = scales.linear(values, floor)
    assert scale.ticks == ticks
    places = [scale.place(value) for value in (min(values), max(values))]
    assert scales.MARGIN <= places[0] <= places[1] <= 100 - scales.MARGIN


def test_ratios_are_equally_far_from_one() -> None:
    scale = scales.ratios([0.5, 2.0])
    assert scale.place(1.0) == 50 and scale.place(0.5) + scale.place(2.0) == pytest.approx(100, abs=0.02)
    assert 1 in scale.ticks and 1 in scales.ratios([9.0, 30.0]).ticks and 1 in scales.ratios([0.01]).ticks
    assert scales.ratios([0.0]).place(-1.0) == scales.MARGIN


def test_colours_span_the_range() -> None:
    assert [scales.level(value, 0.5, 0.9, 7) for value in (0.5, 0.7, 0.9)] == [0, 3, 6]
    assert scales.level(0.9, 0.9, 0.9, 7) == 6


# --- a report with everything -----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What of a run directory the page reads beside the report."""
    folder = tmp_path / "run"
    for name in ("vqa/0", "retrieval/1", "retrieval/2"):
        path = folder / "samples" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 60), (200, 30, 30)).save(path)
    (folder / "recipe.yaml").write_text("model: blip-tiny\nratios:\n- 0.9\n")
    return folder
