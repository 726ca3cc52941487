"""What ``cupycorr bench`` writes: the documented JSON, a page's table, and pictures."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from command import invoke
from cupycorr.cli.bench import floors, measure, peers, plot, report

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["-b", "1", "-c", "3", "--height", "12", "-w", "11", "-k", "1", "-r", "2"]
SUFFIXED = ("geometry", "lookup", "libraries", "floors", "shares")
"""Objects whose keys are names."""
DEVICES = ("cpu", "cuda", "lookup", "images")


def documented():
    """Return the meaning of each field of the page's table, and its unit."""
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    section = text.split("\n## The JSON document\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| `", section, re.MULTILINE))
    return {field: meaning for field, _, meaning in rows}


def fields(value, path=""):
    """Return the fields of a document as the page writes them."""
    if path.endswith(".floors.NAME.PASS"):
        return {path}
    found = {path} if path and not path.endswith("[]") else set()
    if isinstance(value, dict):
        found = {path} if path in ("input", "problems[].sweep") else set()
        inside = path.rpartition(".")[2]
        for key, one in value.items():
            name = "PASS" if key in measure.ALL_PASSES else key
            name = "NAME" if inside in SUFFIXED else name
            found |= fields(one, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        found = {f"{path}[]"}
        if not path.endswith((".lookup.NAME", "sweep.value")):
            inner = [fields(one, f"{path}[]") for one in value]
            if any(isinstance(one, dict) for one in value):
                found = set().union(*inner)
        else:
            found = {path}
    return found


@pytest.fixture
def planted(monkeypatch):
    """Have a peer that fails, and a machine that is warned of."""
    monkeypatch.setattr(floors, "warnings", lambda *_: ["a warning"])
    monkeypatch.setattr(report, "noise", lambda _: ["noise"])
    peer = peers.PEERS["torch-slices"]._replace(obstacle=lambda *_: "is asked for nothing")
    monkeypatch.setitem(peers.PEERS, "torch-slices", peer)


def written(tmp_path, *words):
    file = tmp_path / "bench.json"
    outcome = invoke("bench", *words, "--json", file)
    assert outcome.exit_code == 0, outcome.output
    return json.loads(file.read_text())


@pytest.mark.usefixtures("planted")
def test_the_document_has_the_documented_fields_and_no_others(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torch")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        image.effect_noise((44, 40), 50).save(file)
    documents = [
        written(tmp_path, "cpu", *SMALL, "--against", "torch-slices", "--sweep", "patch=1,1x3"),
        written(tmp_path, "cpu", *SMALL[:-4], "-r", "1", "--radius", "0,1", "--levels", "2",
                "--engine", "torch", "--images", *files),
    ]  # fmt: skip
    found = set().union(*map(fields, documents))
    expected = {field for field, meaning in documented().items() if not meaning.startswith("cuda")}
    assert found == expected
    assert {document["schema"] for document in documents} == {report.SCHEMA}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [["--patch", "3"], ["--radius", "1"]])
def test_the_document_of_a_device_has_the_documented_fields(tmp_path, kind):
    document = written(tmp_path, "cuda", *SMALL[:8], "-r", "1", *kind)
    meanings, found = documented(), fields(document)
    assert found <= meanings.keys()
    of_cuda = {field for field, meaning in meanings.items() if meaning.startswith("cuda")}
    assert of_cuda <= found
    assert not [field for field in found if meanings[field].startswith("cpu")]


def test_a_field_that_is_not_documented_would_be_found():
    document = {"problems": [{"implementations": [{"forward": {"min": 1, "new": 2}}]}]}
    assert fields(document) - documented().keys() == {"problems[].implementations[].PASS.new"}


def test_every_field_has_a_unit_and_each_kind_is_named_first():
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    prefixes = {meaning.partition(":")[0] for meaning in documented().values() if ":" in meaning}
    assert set(DEVICES) <= prefixes
    assert f"Its `schema` is {report.SCHEMA};" in text


@pytest.mark.usefixtures("planted")
def test_markdown_is_a_table_of_every_pass(tmp_path):
    pytest.importorskip("torch")
    file, document = tmp_path / "page.md", tmp_path / "bench.json"
    words = [*SMALL, "--against", "torch-slices", "--sweep", "patch=1,3", "--json", document]
    outcome = invoke("bench", "cpu", *words, "--markdown", file)
    assert outcome.exit_code == 0, outcome.output
    lines = file.read_text().splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert len(rows) == 2 + 2 * 2  # values, passes
    assert rows[0][-2:] == ["extra MB", "cupycorr numpy"]
    numpy, ours, _ = json.loads(document.read_text())["problems"][1]["implementations"]
    assert [one["name"] for one in (numpy, ours)] == ["cupycorr numpy", "cupycorr torch"]
    shown = dict(zip(rows[0], rows[5], strict=True))
    assert (shown["case"], shown["pass"]) == ("options, patch=3", "backward")
    least, other = (one["backward"]["min"] for one in (ours, numpy))
    assert shown["min ms"] == report.number(1e3 * least)
    assert shown["median ms"] == report.number(1e3 * ours["backward"]["median"])
    quartiles = (report.number(1e3 * ours["backward"][key]) for key in ("q1", "q3"))
    assert shown["q1-q3 ms"] == "-".join(quartiles)
    ratio = f"({other / least:.3g}x)"
    assert shown["cupycorr numpy"].split() == [report.number(1e3 * other), ratio]
    assert "- a warning" in lines
    noisy = "- quartiles are over 10% of a median apart"
    assert f"{noisy} (options, patch=1; options, patch=3)" in lines
    skipped = "- torch-slices: skipped: is asked for nothing"
    assert f"{skipped} (options, patch=1; options, patch=3)" in lines


def test_markdown_adds_up_the_lookups_of_a_pair(tmp_path):
    pytest.importorskip("torch")
    words = ["-b", "1", "-c", "4", "--height", "9", "-w", "11", "--radius", "1", "-r", "2"]
    document = written(tmp_path, "cpu", *words, "--against", "torch-volume")
    shown = invoke("bench", "show", tmp_path / "bench.json").stdout.splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in shown if line.startswith("|")]
    titles, *rows = rows[:1] + rows[2:]
    assert [row[2] for row in rows] == [*measure.ALL_PASSES, "12 lookups", "with gradients"]
    for one in document["problems"][0]["implementations"][1:]:
        least = {step: one[step]["min"] for step in measure.ALL_PASSES}
        wanted = sum(n * t for n, t in zip((1, 12, 12, 1), least.values(), strict=True))
        column = titles.index("min ms" if one["name"] == "cupycorr torch" else one["name"])
        assert rows[-1][column].split()[0] == report.number(1e3 * wanted)


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_a_dash_writes_nothing_else_to_standard_output(option):
    out = invoke("bench", "cpu", *SMALL, "--engine", "numpy", option, "-").stdout
    if option == "--json":
        assert json.loads(out)["schema"] == report.SCHEMA
    else:
        assert out.splitlines()[2].startswith("| case | pass | min ms |")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json", "-", "--markdown", "-"], "only one can be -"),
        (["--json", "a.png", "--plot", "a.png"], "--json and --plot a.png: is given twice"),
        (["--plot", "a.gif"], "--plot must end in .svg, .png, .pdf, got a.gif"),
        (["--plot", "nowhere/a.svg"], "there is no folder nowhere"),
    ],
)
def test_files_that_cannot_be_written_are_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(plot, "has", lambda module: True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_text("")
    outcome = invoke("bench", "cpu", *SMALL, *words)
    assert outcome.exit_code == 2
    assert message in outcome.stderr


def test_a_picture_without_matplotlib_is_refused_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(plot, "has", lambda module: False)
    outcome = invoke("bench", "cpu", *SMALL, "--plot", tmp_path / "a.svg")
    assert outcome.exit_code == 2
    assert "pip install 'cupycorr[plot]'" in outcome.stderr


# Pictures.

NAMES = ("cupycorr numpy", "cupycorr torch", *peers.PEERS)


def timing(seconds):
    shares = {"shares": {"matmul": 0.1, "copy": 0.1}}
    return report.statistics([seconds, 1.1 * seconds, 1.3 * seconds]) | shares


def problem(name, place, step=None, names=NAMES, passes=measure.PASSES):
    """Return a problem of the document: each implementation takes twice as long as the last."""
    rows = [
        {"name": one, "status": "timed", **{p: timing(2.0**number * 1e-4 * place) for p in passes}}
        for number, one in enumerate(names)
    ]
    rows.append({"name": "absent", "status": "skipped", "reason": ""})
    return {
        "name": name, "implementations": rows,
        "sweep": None if step is None else {"parameter": "patch", "value": step},
        "multiply_adds": dict.fromkeys(measure.PASSES, 10**7 * place),
        "bytes": dict.fromkeys(measure.PASSES, 10**6),
        "floors": {name: {p: {"min": 1e-5 * place} for p in measure.PASSES}
                   for name in ("matmul", "copy")},
    }  # fmt: skip


def document(*problems):
    return {
        "cupycorr": "1.2.3", "device": "cpu", "dtype": "float32", "threads": 4,
        "machine": {"processor": "A Processor of a Rather Long Name (R) @ 3.00 GHz"},
        "problems": problems,
    }  # fmt: skip


DOCUMENTS = {
    "one": document(problem("default", 1, names=NAMES[:1])),
    "all presets": document(*(problem(f"network-level-{n}", n + 1) for n in range(15))),
    "equal intensities": document(*(problem(f"options, r={n}", 1) for n in range(12))),
    "lookups": document(problem("raft", 2, passes=measure.ALL_PASSES)),
    "a sweep": document(*(problem(f"pwc, patch={n}", n, n) for n in (1, 3, 9, 21))),
    "a sweep of pairs": document(
        *(problem(f"pwc, patch={n}x9", n, [n, 9]) for n in (1, 3, 9)), problem("default", 3)
    ),
    "two sweeps": document(
        *(problem(f"{name}, patch={n}", n, n) for name in ("a", "b") for n in (2, 1))
    ),
    "nothing": document(problem("default", 1, names=())),
}


def texts_that_overlap(figure):
    """Return the pairs of texts of a figure of which one covers the other, or that leave it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    FigureCanvasAgg(figure).draw()
    whole = figure.bbox
    boxes = []
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible():
            box = text.get_window_extent()
            if box.width and _is_drawn(text):
                boxes.append((text.get_text(), box))
    outside = [
        (text, "") for text, box in boxes
        if box.x0 < whole.x0 - 1 or box.x1 > whole.x1 + 1 or box.y0 < -1 or box.y1 > whole.y1 + 1
    ]  # fmt: skip
    return outside + [
        (one, two)
        for (one, box1), (two, box2) in combinations(boxes, 2)
        if min(box1.x1, box2.x1) - max(box1.x0, box2.x0) > 1
        and min(box1.y1, box2.y1) - max(box1.y0, box2.y0) > 1
    ]


def _is_drawn(text):
    """Tell whether a label belongs to a tick inside its axis's limits."""
    for axes in text.figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if text in (tick.label1, tick.label2):
                    return low <= tick.get_loc() <= high
    return True


@pytest.fixture
def drawing():
    pytest.importorskip("matplotlib")
    import matplotlib

    with matplotlib.rc_context(plot.STYLE):
        yield


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_text_of_a_picture_covers_another(name):
    assert not texts_that_overlap(plot.figure(DOCUMENTS[name]))


@pytest.mark.usefixtures("drawing")
def test_texts_that_overlap_would_be_found(monkeypatch):
    monkeypatch.setattr(plot, "APART", 0)
    assert texts_that_overlap(plot.figure(DOCUMENTS["equal intensities"]))


@pytest.mark.usefixtures("drawing")
def test_bars_end_at_the_medians():
    figure = plot.figure(DOCUMENTS["one"])
    forward, backward, _ = figure.axes
    assert [axes.get_title(loc="left") for axes in (forward, backward)] == ["forward", "backward"]
    assert [bar.get_width() for bar in forward.patches] == pytest.approx([0.11])
    assert [text.get_text() for text in forward.texts] == [report.number(0.11)]


@pytest.mark.usefixtures("drawing")
def test_curves_pass_through_the_medians_in_the_order_of_the_values():
    forward = plot.figure(DOCUMENTS["two sweeps"]).axes[0]
    assert forward.get_title(loc="left") == "a: forward"
    first = forward.lines[0]
    assert list(first.get_xdata()) == [1, 2]
    assert list(first.get_ydata()) == pytest.approx([0.11, 0.22])
    floor = next(line for line in forward.lines if line.get_linestyle() == "--")
    assert list(floor.get_ydata()) == pytest.approx([0.01, 0.02])


@pytest.mark.usefixtures("drawing")
def test_the_roofline_bends_where_both_floors_meet():
    axes = plot.figure(DOCUMENTS["one"]).axes[-1]
    roof = axes.lines[0]
    # 2e7 FLOP and 1e6 bytes in 1e-5 s each.
    assert axes.get_xlabel().endswith("; the line: at most 100.0 GB/s and 2000 GFLOP/s")
    assert (20, pytest.approx(2000)) in list(zip(roof.get_xdata(), roof.get_ydata(), strict=True))
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in points] == [
        (20, pytest.approx(2e7 / 1e-4 / 1e9))
    ]


@pytest.mark.parametrize(
    ("kind", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")]
)
def test_a_picture_is_written_beside_the_tables(tmp_path, kind, start):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"bench.{kind}"
    outcome = invoke("bench", "cpu", *SMALL, "--engine", "numpy", "--plot", file)
    assert outcome.exit_code == 0, outcome.output
    assert file.read_bytes().startswith(start)
    assert "cupycorr numpy  Forward" in outcome.stdout


def test_equal_documents_are_drawn_alike():
    pytest.importorskip("matplotlib")
    once, twice = (plot.picture(DOCUMENTS["a sweep"], "svg") for _ in range(2))
    assert once == twice


def test_a_document_is_shown_as_it_was_written(tmp_path):
    pytest.importorskip("matplotlib")
    before, after = (
        [tmp_path / f"{when}.{suffix}" for suffix in ("md", "svg")] for when in ("before", "after")
    )
    outputs = ["--engine", "numpy", "--markdown", before[0], "--plot", before[1]]
    document = written(tmp_path, "cpu", *SMALL, *outputs)
    options = ["--markdown", after[0], "--plot", after[1]]
    assert invoke("bench", "show", tmp_path / "bench.json", *options).exit_code == 0
    for one, other in zip(before, after, strict=True):
        assert one.read_bytes() == other.read_bytes()
    shown = invoke("bench", "show", tmp_path / "bench.json")
    assert shown.stdout == before[0].read_text()
    (tmp_path / "bench.json").write_text(json.dumps(document | {"schema": report.SCHEMA + 1}))
    refused = invoke("bench", "show", tmp_path / "bench.json")
    assert refused.exit_code == 2
    assert f"has schema {report.SCHEMA + 1}" in refused.stderr
    (tmp_path / "bench.json").write_text(json.dumps(document | {"machine": {}}))
    refused = invoke("bench", "show", tmp_path / "bench.json")
    assert refused.exit_code == 2
    assert "lacks a field of schema" in refused.stderr
