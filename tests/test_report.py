"""Reports of results files: the numbers in the tables, the comparison's flags, the README, the page and its plots."""

import base64
import re
import sys

import pytest

from resnet_kernels.analysis.report import Change, number, readme_tables
from resnet_kernels.analysis.results import Results, Row
from resnet_kernels.analysis.rows import comparisons, distinct
from resnet_kernels.cli.main import main

PROVIDERS = {"eager": (True, 0.040), "inductor": (True, 0.025), "replaced": (False, 0.030), "frozen": (False, 0.020)}


def row(provider, seconds, peer=False, section="inference", case="resnet50", **more):
    more = {"dtype": "bf16", "batch": 16, "size": 224, "status": "ok"} | more
    spread = {"p20": 0.98 * seconds, "p80": 1.03 * seconds, "rounds": 10} if seconds else {}
    return Row(section, case, provider, peer=peer, seconds=seconds, **(spread | more))


def whole():
    """Every section, with a loss, a wrong, an unavailable and a failed row."""
    facts = {
        "device": "cuda",
        "processor": "NVIDIA H200",
        "date": "2026-11-25",
        "commit": "11ec96a",
        "driver": "580.65",
    }
    facts |= {"versions": {"torch": "2.11.0"}, "memory": 4.3e12, "matrix": {"bf16": 7.9e14}, "l2": 50e6, "threads": 8}
    results = Results(facts)
    for name in ("primitives", "blocks", "layers", "inference", "training", "profile"):
        section = results.section(name)
        section.status, section.seconds, section.budget = "ok", 31.0, 60.0
    results.section("profile").details = {"tool": "ncu", "clock": 1755.5}
    work = {"bytes": 10**9, "flops": 131 * 10**9, "floor": 0.004}
    for name, (peer, seconds) in PROVIDERS.items():
        results.rows.append(row(name, seconds, peer, peak_bytes=int(seconds * 1e11), **work))
        results.rows.append(row(name, seconds / 10, peer, batch=1, peak_bytes=int(seconds * 1e10)))
        results.rows.append(row(name, seconds / 1000, peer, "blocks", "64x56", **(work | {"floor": 5e-6})))
        results.rows.append(row(name, seconds / 4, peer, "layers", part="layer1.0", floor=1e-3))
        results.rows.append(row(name, seconds / 2, peer, "layers", part="layer1.1", floor=2e-3))
    results.rows.append(row("inductor", 0.008, True, mode="graph", **work))
    results.rows.append(row("triton", None, status="wrong", reason="outside | the rule", errors={"rms": 0.02}))
    results.rows.append(row("tensorrt", None, True, status="unavailable", reason="not <installed>"))
    results.rows.append(row("cuda", None, section="layers", part="layer1.1", status="failed", reason="a crash"))
    results.rows.append(row("eager", 0.1, True, "training"))
    results.rows.append(row("frozen", None, False, "training", status="unavailable", reason="trains nothing"))
    results.rows.append(row("bottleneck", 3e-4, False, "profile", metrics={"dram.bytes": 1.25e9}))
    return results


def run(capsys, *args):
    code = main(["report", *map(str, args)])
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), " ".join(err.split())


def cells(text, *start):
    """Of the table line that starts with these cells."""
    lines = [line for line in text.splitlines() if line.startswith("| " + " | ".join(start) + " |")]
    assert len(lines) == 1, (start, lines)
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", lines[0])[1:-1]]


def table_after(text, heading):
    return text.split(f"\n{heading}\n", 1)[1].split("\n#")[0]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    whole().save(folder / "gpu.json")
    assert main(["report", str(folder / "gpu.json"), "--out", str(folder / "out"), "--png"]) == 0
    return folder / "out"


@pytest.fixture
def markdown(reported):
    return (reported / "report.md").read_text()


def test_numbers_have_three_digits():
    assert [number(v) for v in (0.0, 20.35, 9.996, 12345.6, 0.00123, None)] == [
        "0",
        "20.4",
        "10.0",
        "12,346",
        "0.00123",
        "–",
    ]
    assert number(0.0254, 1e3) == "25.4"


def test_facts_and_sections(markdown):
    assert cells(markdown, "memory")[1] == "4.30 TB/s" and cells(markdown, "matrix")[1] == "bf16 790 TFLOP/s"
    assert cells(markdown, "driver")[1] == "580.65" and cells(markdown, "versions")[1] == "torch 2.11.0"
    assert cells(markdown, "layers", "ok") == ["layers", "ok", "31 of 60", "9"]
    assert "did not run to the end" not in markdown
    assert cells(markdown, "clock")[1] == "1,756"


def test_a_model_table(markdown):
    names = ["provider", "mode", "ms", "images/s", "x best peer", "of floor", "GB/s", "TFLOP/s", "peak MB", "note"]
    # Tables of layers and of training have the same title.
    table = markdown.split("## Inference\n")[1].split("## ")[1]
    assert cells(table, "provider") == names
    assert cells(table, "ours, frozen")[1:] == [
        "call",
        "20.0 (19.6–20.6)",
        "800",
        "0.40x",
        "20.0 %",
        "50.0",
        "6.55",
        "2,000",
        "",
    ]
    # The best peer is the graph, and has a factor of its own.
    assert cells(table, "inductor", "graph")[3:5] == ["2,000", "1.00x"]
    assert cells(table, "eager")[4] == "0.20x"


def test_what_has_no_time_stays_with_its_reason(markdown):
    assert cells(markdown, "ours, triton")[2:] == ["wrong"] + ["–"] * 6 + [r"outside \| the rule; rms 2.0e-02"]
    assert cells(markdown, "tensorrt")[2::7] == ["unavailable", "not &lt;installed>"]
    assert "layer1.1, ours, cuda: failed. a crash" in markdown


def test_at_a_glance_compares_the_best_of_both(markdown):
    line = cells(markdown, "inference", "resnet50, bf16, batch 16, 224 x 224")
    assert line[2:] == ["inductor (graph): 2,000", "ours, frozen: 800", "0.40x"]
    assert cells(markdown, "training", "resnet50, bf16, batch 16, 224 x 224")[2:] == ["eager: 160", "–", "–"]


def test_blocks_layers_profile_and_gaps(markdown):
    blocks = table_after(markdown, "## Blocks")
    assert cells(blocks, "64x56", "bf16", "16", "224", "ours, frozen") == (
        ["64x56", "bf16", "16", "224", "ours, frozen", "call", "20.0 (19.6–20.6)", "1.25x", "5.00", "25.0 %"]
        + ["50,000", "6,550"]
    )
    assert cells(markdown, "part") == [
        "part",
        "floor",
        "eager",
        "inductor",
        "ours, replaced",
        "ours, frozen",
        "ours, cuda",
    ]
    assert cells(markdown, "layer1.1") == ["layer1.1", "2,000", "20,000", "12,500", "15,000", "10,000", "failed"]
    # A provider that lacks a part has no sum.
    assert cells(markdown, "sum") == ["sum", "3,000", "30,000", "18,750", "22,500", "15,000", "–"]
    assert cells(table_after(markdown, "## Profile"), "resnet50")[-1] == "1,250,000,000"
    gaps = table_after(markdown, "## Largest gaps to the floor")
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in gaps.splitlines() if line.startswith("| layers")]
    assert [(line[2], line[6], line[11]) for line in lines] == [
        ("layer1.1", "ours, replaced", "13,000"),
        ("layer1.1", "ours, frozen", "8,000"),
        ("layer1.0", "ours, replaced", "6,500"),
    ]
    assert "| eager" not in gaps


def test_the_page_needs_nothing_else(reported):
    page = (reported / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|url\(", page)
    images = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)"', page)
    names = [name for name, _ in images]
    assert names == [
        "roofline-inference-bf16",
        "roofline-blocks-bf16",
        "speed-inference-resnet50-bf16-224",
        "memory-inference-resnet50-bf16-224",
        "layers-resnet50-bf16-16-224",
    ]
    assert all(base64.b64decode(data).rstrip().endswith(b"</svg>") for _, data in images)
    assert page.count("<img ") == len(images) and all((reported / f"{n}.png").stat().st_size > 10_000 for n in names)
    assert '<td class="n">20.0 (19.6–20.6)</td>' in page and "not &lt;installed&gt;" in page
    assert "Ours has no time: training of resnet50, bf16, batch 16" in page


def test_the_plots_draw_the_rows():
    from resnet_kernels.analysis import plots

    results = whole()
    speed, memory, layers = (
        [*f(results).figures.values()][0] for f in (plots.speedups, plots.memory, plots.waterfalls)
    )
    # Batch 16: ours in 20 ms, eager in 40, inductor's graph in 8; TensorRT has no time.
    assert [bar.get_x() + bar.get_width() for bar in speed.axes[1].patches] == pytest.approx([2.0, 0.4, 1.0])
    assert {t.get_text() for t in speed.axes[1].texts} == {"2.00x", "0.40x (graph)", "unavailable"}
    assert [bar.get_width() for bar in memory.axes[1].patches] == pytest.approx([4.0, 2.5, 3.0, 2.0])
    eager = layers.axes[0].patches
    assert [bar.get_x() for bar in eager] == pytest.approx([0, 0, 10, 10])
    assert [bar.get_width() for bar in eager] == pytest.approx([10, 1, 20, 2])
    assert [t.get_text() for t in layers.axes[4].texts] == ["no row", "failed"]
    axes = plots.rooflines(results).figures["roofline-inference-bf16"].axes[0]
    roof = axes.lines
    assert roof[0].get_ydata()[-1] == 790 and list(roof[0].get_xdata())[1] == pytest.approx(7.9e14 / 4.3e12)
    # Points of one case stand at its intensity, exactly above each other; their names stand apart.
    assert {float(point.get_xdata()[0]) for point in roof[1:]} == {131.0}
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert len(heights) == 4 and all(b - a > 0.06 for a, b in zip(heights, heights[1:], strict=False))
    assert "logarithmic" in axes.get_xlabel() and "logarithmic" in speed.axes[0].get_xlabel()
    assert sorted(float(point.get_ydata()[0]) for point in roof[1:]) == pytest.approx([3.275, 131 / 30, 6.55, 16.375])
    shades = plots.colours(results)
    assert (
        len(set(shades.values())) == len(shades)
        and eager[0].get_facecolor() == speed.axes[1].patches[0].get_facecolor()
    )


def test_no_roofline_without_ceilings():
    from resnet_kernels.analysis import plots

    results = whole()
    del results.facts["matrix"]
    assert plots.rooflines(results).text == "No roofline. The file lacks the matrix ceiling of bf16."
    del results.facts["memory"]
    assert plots.rooflines(results).text == "No roofline. The file lacks the memory ceiling."


def test_labels_stay_apart():
    from resnet_kernels.analysis.plots import _apart

    assert _apart([0.1, 0.9, 0.5], 0.1, 1.0) == [0.1, 0.9, 0.5]
    assert _apart([0.5, 0.5, 0.5], 0.1, 1.0) == pytest.approx([0.4, 0.5, 0.6])
    assert _apart([1.0, 0.99], 0.1, 1.0) == pytest.approx([1.0, 0.9])


def test_a_cpus_peak_memory_is_not_drawn():
    """The rows of a file cannot be compared there: the pool of activations is in them, whichever implementation filled
    it."""
    from resnet_kernels.analysis import plots

    results = whole()
    assert plots.memory(results).figures
    results.facts["device"] = "cpu"
    found = plots.memory(results)
    assert not found.figures and found.text.startswith("No plot.")


def test_one_implementation_is_shown_once():
    results = Results({"device": "cpu"})
    results.rows = [row("frozen", 0.1), row("frozen cpu", 0.1), row("frozen library", 0.2), row("eager cpu", 0.3, True)]
    assert [r.provider for r in distinct(results, results.rows)] == ["frozen", "frozen library", "eager cpu"]
    results.facts["device"] = "cuda"
    assert len(distinct(results, results.rows)) == 4
    results.facts["device"], results.rows[0].status = "cpu", "failed"
    assert len(distinct(results, results.rows)) == 4


def test_comparisons_take_the_best_peer_of_the_machine(tmp_path):
    facts = {"device": "cpu", "processor": "AMD EPYC", "date": "2026-11-25", "commit": "11ec96a", "versions": {}}
    facts |= {"threads": 2, "capability": "AVX2"}

    def save(name, rows, **other):
        Results(facts | other, rows=rows).save(tmp_path / f"{name}.json")

    save("bf16", [row("frozen", 0.05), row("inductor", 0.5, True)])
    save("fp32", [row("frozen", 0.08, dtype="fp32"), row("onnxruntime", 0.06, True, dtype="fp32")])
    # Peers of another machine, another batch and a commit with local changes do not count.
    save("other", [row("eager", 0.001, True)], capability="AVX512")
    save("small", [row("eager", 0.001, True, batch=1)])
    save("dirty", [row("eager", 0.001, True), row("frozen", 0.0001)], commit="11ec96a-dirty")
    found = {c.source: c for c in comparisons(tmp_path)}
    assert list(found) == ["bf16", "fp32"]
    # Emulated bf16 is no bar where the same processor is faster in fp32; and bf16 is none for fp32.
    assert found["bf16"].best.provider == "onnxruntime" and found["bf16"].factor == pytest.approx(1.2)
    assert found["fp32"].factor == pytest.approx(0.75)
    assert found["bf16"].machine == "AMD EPYC AVX2, 2 threads"


def test_a_file_cut_halfway(capsys, tmp_path):
    results = whole()
    results.rows = [results.rows[0], row("frozen", None, status="cut", reason="the budget ended")]
    results.rows[0].floor = results.rows[0].p20 = None
    results.section("inference").status, results.section("training").status = "running", "waiting"
    results.save(tmp_path / "half.json")
    assert run(capsys, tmp_path / "half.json", "--out", tmp_path / "out")[0] == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "Not the whole suite: inference, training did not run to the end." in text
    assert cells(text, "eager")[:4] == ["eager", "call", "40.0", "400"]
    assert cells(text, "ours, frozen")[2::6] == ["cut", "the budget ended"]
    assert "No row of ours has time and floor." in text and "## Training" not in text
    Results(results.facts).save(tmp_path / "empty.json")
    assert run(capsys, tmp_path / "empty.json", "--out", tmp_path / "out")[0] == 0
    assert "No whole model was measured." in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    "old, new, flag",
    [
        ((1.0, 0.98, 1.02), (1.04, 1.03, 1.05), ""),  # 4 %
        ((1.0, 0.98, 1.02), (1.10, 1.08, 1.12), "regression"),
        ((1.10, 1.08, 1.12), (1.0, 0.98, 1.02), "improvement"),
        ((1.0, 0.9, 1.3), (1.10, 1.08, 1.12), ""),  # within what the old one took
        ((1.10, 0.9, 1.3), (1.0, 0.98, 1.02), ""),
        ((1.0, None, None), (1.10, None, None), "no p20–p80 to judge by"),
        ((1.0, 0.98, 1.02), (None, None, None), "ok -> wrong"),
    ],
)
def test_flags_of_a_comparison(old, new, flag):
    rows = [
        Row("inference", "resnet50", "frozen", "ok" if s else "wrong", seconds=s, p20=a, p80=b)
        for s, a, b in (old, new)
    ]
    change = Change(*rows)
    assert change.flag == flag and change.fails == (flag in ("regression", "ok -> wrong"))
    for r in rows:
        r.peer = True
    assert not change.fails


def test_a_comparison(capsys, tmp_path):
    old, new = whole(), whole()
    new.facts["commit"] = "2222222"
    by_name = {(r.section, r.provider, r.batch, r.mode): r for r in new.rows}
    for key, factor in {("inference", "frozen", 16, "call"): 1.5, ("inference", "replaced", 16, "call"): 0.5}.items():
        r = by_name[key]
        r.seconds, r.p20, r.p80 = r.seconds * factor, r.p20 * factor, r.p80 * factor
    worse = by_name["blocks", "frozen", 16, "call"]
    worse.status, worse.seconds, worse.reason = "wrong", None, "outside the rule"
    new.rows = [r for r in new.rows if r.section != "training"] + [row("new", 0.1)]
    old.save(tmp_path / "old.json")
    new.save(tmp_path / "new.json")
    args = tmp_path / "old.json", tmp_path / "new.json", "--out", tmp_path / "out"
    code, out, _ = run(capsys, *args)
    assert code == 0 and run(capsys, *args, "--fail-on-regression")[0] == 1
    assert run(capsys, tmp_path / "old.json", *args[:1], *args[2:], "--fail-on-regression")[0] == 0
    assert "Status changed: 1. Regressions: 1, of ours 1. Improvements: 1." in out
    assert f"{len(old.rows) - 2} rows in both files, 2 only in the old, 1 only in the new." in out
    run(capsys, *args)
    text = (tmp_path / "out/report.md").read_text()
    assert cells(text, "commit") == ["commit", "11ec96a", "2222222"]
    lines = [line for line in table_after(text, "## Rows").splitlines() if line.startswith("|")][2:]
    assert [line.split(" | ")[0] for line in lines[:4]] == ["| ok -> wrong", "| regression", "| improvement", "| "]
    assert cells(text, "regression")[-4:] == ["20.0 (19.6–20.6)", "30.0 (29.4–30.9)", "1.50x", ""]
    assert cells(text, "ok -> wrong")[-4:] == ["0.0200 (0.0196–0.0206)", "wrong", "–", "outside the rule"]
    assert '<h2 id="rows">Rows</h2>' in (tmp_path / "out/report.html").read_text()


README = """# A package

<!-- results results/gpu.json: inference batch=16 -->
what was there before
<!-- end of results -->

Text between.

<!-- results results/gpu.json results/cpu.json: inference -->
<!-- end of results -->
"""


@pytest.fixture
def project(tmp_path):
    results = whole()
    results.save(tmp_path / "results/gpu.json")
    results.facts |= {"processor": "AMD EPYC", "threads": 2}
    results.rows = [row("inductor", 1.0, True, batch=16, dtype="fp32"), row("frozen", 0.8, batch=16, dtype="fp32")]
    results.save(tmp_path / "results/cpu.json")
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_readme_tables(project):
    text = readme_tables(README, project)
    first, second = (part.split("<!-- end")[0] for part in text.split(" -->\n")[1::2])
    assert "what was there" not in text and "Text between." in text
    assert first.splitlines()[1] == "| images/s (x best peer) | resnet50 bf16 |"
    assert [line.split(" |")[0] for line in first.splitlines()[3:9]] == [
        "| eager",
        "| inductor",
        "| tensorrt",
        "| ours, replaced",
        "| ours, frozen",
        "| ours, triton",
    ]
    assert cells(first, "inductor")[1] == "2,000 (1.00x) (graph)" and cells(first, "ours, frozen")[1] == "800 (0.40x)"
    assert cells(first, "ours, triton")[1] == "wrong" and cells(first, "tensorrt")[1] == "unavailable"
    assert "\nNVIDIA H200, 8 threads, torch 2.11.0, batch 16, commit 11ec96a, 2026-11-25.\n" in first
    assert cells(second, "images/s (x best peer)")[1:] == [
        "resnet50 bf16, batch 16, NVIDIA H200",
        "resnet50 bf16, batch 1, NVIDIA H200",
        "resnet50 fp32, batch 16, AMD EPYC",
    ]
    assert cells(second, "ours, frozen")[1:] == ["800 (0.40x)", "500 (1.25x)", "20.0 (1.25x)"]
    assert cells(second, "eager")[3] == "–" and "AMD EPYC, 2 threads, torch 2.11.0, commit" in second
    assert readme_tables(text, project) == text


def test_accuracy(capsys, tmp_path):
    results, case = whole(), {"section": "accuracy", "case": "r50-layer1", "part": "ordinary", "batch": 4, "size": 28}
    results.rows += [
        row("eager channels_last", None, True, dtype="fp32", errors={"y": 1.2e-6, "d x": 2.4e-6}, **case),
        row("replaced", None, dtype="fp32", errors={"y": 3e-7}, **case),
        row("eager channels_last", None, True, dtype="bf16", errors={"y": 0.004, "d x": 0.008}, **case),
        row("replaced", None, dtype="bf16", status="failed", reason="a crash", **case),
    ]
    results.save(tmp_path / "gpu.json")
    assert run(capsys, tmp_path / "gpu.json", "--out", tmp_path)[0] == 0
    text = (tmp_path / "report.md").read_text()
    names = ["fp32 ordinary, eager", "fp32 ordinary, ours", "bf16 ordinary, eager", "bf16 ordinary, ours"]
    assert "### r50-layer1, batch 4, 28 x 28" in text and "bf16 ordinary, ours: a crash." in text
    block = "<!-- results gpu.json: accuracy r50-layer1 -->\n<!-- end of results -->"
    for table in (text, readme_tables(block, tmp_path)):
        assert cells(table, "relative error")[1:] == names
        assert cells(table, "y")[1:] == ["1.2e-06", "3.0e-07", "4.0e-03", "failed"]
        assert cells(table, "d x")[1:] == ["2.4e-06", "–", "8.0e-03", "failed"]
    assert '<td class="n">3.0e-07</td>' in (tmp_path / "report.html").read_text()


def test_readme_round_trip_and_check(capsys, project):
    path = project / "README.md"
    assert run(capsys, "--readme", path, "--check")[0] == 1 and path.read_text() == README
    code, out, _ = run(capsys, "--readme", path)
    assert code == 0 and "tables written" in out and "| ours, frozen | 800 (0.40x) |" in path.read_text()
    assert run(capsys, "--readme", path, "--check")[0] == 0
    path.write_text(path.read_text().replace("800 (0.40x)", "900 (2.00x)"))
    assert run(capsys, "--readme", path, "--check")[0] == 1


@pytest.mark.parametrize(
    "block, says",
    [
        ("<!-- results gone.json: inference -->\n<!-- end of results -->", "gone.json"),
        ("<!-- results results/gpu.json: blocks -->\n<!-- end of results -->", "or 'accuracy CASE', got 'blocks'"),
        (
            "<!-- results results/gpu.json: inference batch=3 -->\n<!-- end of results -->",
            "'inference batch=3', got none",
        ),
        ("<!-- results results/gpu.json: accuracy r9 -->\n<!-- end of results -->", "'accuracy r9', got none"),
        ("<!-- results results/gpu.json: inference -->\n", "expected '<!-- end of results -->' after each"),
    ],
)
def test_readme_errors(capsys, project, block, says):
    (project / "README.md").write_text(block + "\n")
    code, _, err = run(capsys, "--readme", project / "README.md")
    assert (
        code == 2
        and says.replace(" ", "") in "".join(err.split())
        and (project / "README.md").read_text() == block + "\n"
    )


def test_errors_are_a_sentence_and_a_code(capsys, project):
    gpu = project / "results/gpu.json"
    (project / "file").write_text("no results")
    for args, says in (
        ((), "expected one results file, or two to compare, got none"),
        ((gpu, gpu, gpu), "expected one results file, or two to compare, got " + " ".join([str(gpu)] * 3)),
        ((project / "file",), f"{project / 'file'}: Expecting value"),
        ((gpu, "--out", project / "file"), "expected a folder, got"),
        ((gpu, "--check"), "expected --readme FILE"),
        ((gpu, "--readme", project / "README.md"), "no results files beside it"),
        (("--readme", project / "none.md"), "expected a file, got"),
    ):
        code, _, err = run(capsys, *args)
        assert code == 2 and err.startswith("resnet-kernels: ") and says.replace(" ", "") in err.replace(" ", "")


def test_markdown_without_matplotlib(capsys, monkeypatch, project):
    monkeypatch.delitem(sys.modules, "resnet_kernels.analysis.plots", raising=False)
    monkeypatch.delattr("resnet_kernels.analysis.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, project / "results/gpu.json", "--out", project / "out")
    assert code == 2 and "pip install 'resnet_kernels[demo]'" in err
    assert "ours, frozen" in (project / "out/report.md").read_text() and not (project / "out/report.html").exists()
