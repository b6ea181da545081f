"""Tables of measured choices: how they are found, read and written, what they change, and the tuner that makes them."""

import ast
import dataclasses
import functools
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import resnet_kernels as rk
from resnet_kernels.analysis.roofline import launches_of
from resnet_kernels.analysis.timing import Sample
from resnet_kernels.backends import library, select, tables
from resnet_kernels.backends.contract import Call, Geometry
from resnet_kernels.backends.gpu import ahead, configs, launch
from resnet_kernels.backends.gpu.configs import Config
from resnet_kernels.backends.gpu.inference import dispatch, hopper
from resnet_kernels.backends.gpu.inference.tail import Tail
from resnet_kernels.backends.gpu.launch import assume_arch, recording
from resnet_kernels.backends.tables import Table
from resnet_kernels.testing import randomize_
from resnet_kernels.tuning import launches, tuner
from resnet_kernels.tuning.store import store

THREE = (((64, 64, 3, 3), Geometry(1, 1)),)


def call(device="cuda", dtype=torch.bfloat16, size=(256, 64, 56, 56)):
    return Call(torch.device(device), dtype, frozenset({"conv", "residual"}), THREE, size)


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Where tables lie: shipped, and the user's."""
    shipped, user = tmp_path / "shipped", tmp_path / "user"
    shipped.mkdir()
    user.mkdir()
    monkeypatch.setattr(tables, "SHIPPED", shipped)
    monkeypatch.setenv("RESNET_KERNELS_CACHE", str(user))
    tables.forget()
    yield shipped, user
    tables.forget()


@pytest.fixture
def h200(monkeypatch, folders):
    """A GPU by its metadata."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "_properties", lambda device: (90, 132))
    tables._identity.cache_clear()
    yield folders
    tables._identity.cache_clear()


def write_table(folder, call, fastest="gpu", **other):
    identity = tables.identity(call.device) | other
    row = {"call": tables.key(call), "fastest": fastest}
    store(folder / tables.file_of(identity), identity, Table({row["call"]: row}, {}))


@pytest.mark.parametrize("place", [0, 1], ids=["shipped", "the user's"])
def test_a_measured_table_lets_a_kernel_run_unasked(h200, place, monkeypatch):
    assert select.choose(call()).NAME == "library"
    assert "no table has this call" in select.reasons(call())["gpu"]
    write_table(h200[place], call())
    assert select.choose(call()).NAME == "gpu" and select.reasons(call())["gpu"] is None
    assert select.choose(call(size=(1, 64, 56, 56))).NAME == "library"
    with rk.use_backend("library"):
        assert select.choose(call()).NAME == "library"
    monkeypatch.setenv("RESNET_KERNELS_TUNING", "off")
    assert select.choose(call()).NAME == "library"
    monkeypatch.setenv("RESNET_KERNELS_TUNING", "sometimes")
    with pytest.raises(ValueError, match="RESNET_KERNELS_TUNING: expected off or nothing, got 'sometimes'"):
        select.choose(call())


def test_the_users_table_wins(h200):
    write_table(h200[0], call(), "gpu")
    write_table(h200[1], call(), "library")
    assert select.choose(call()).NAME == "library"


@pytest.mark.parametrize(
    "other",
    [
        {"device": "NVIDIA L4"},
        {"capability": "sm_89"},
        {"torch": "2.10.0"},
        {"triton": "3.5.0"},
        {"resnet_kernels": "0.0.1"},
        {"kernels": "0123456789abcdef"},
        {"fastest": "a backend of the future"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_tables_of_others_do_not_count(h200, other):
    write_table(h200[1], call(), **other)
    assert select.choose(call()).NAME == "library"


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema": 1}', '{"schema": 2, "identity": {}, "calls": [], "launches": []}']
)
def test_a_file_that_is_no_table_is_ignored_with_a_warning_and_rebuilt(h200, text):
    identity = tables.identity(torch.device("cuda"))
    path = h200[1] / tables.file_of(identity)
    path.write_text(text)
    with pytest.warns(UserWarning, match="expected a table of measured choices of schema 1.*ignored"):
        assert select.choose(call()).NAME == "library"
    with pytest.warns(UserWarning, match="replaced"):
        write_table(h200[1], call())
    assert select.choose(call()).NAME == "gpu"


def test_a_table_of_other_versions_under_its_name_is_replaced_with_a_warning(h200):
    identity = tables.identity(torch.device("cuda"))
    path = h200[1] / tables.file_of(identity)
    store(path, identity | {"torch": "1.0"}, Table({"old": {"call": "old", "fastest": "library"}}, {}))
    with pytest.warns(UserWarning, match="expected a table for .*replaced"):
        write_table(h200[1], call())
    assert "old" not in tables.read(path)[1].calls


def _store(path, i):
    row = {"call": f"call {i}", "fastest": "library"}
    store(path, {"device": "one"}, Table({row["call"]: row}, {}))


def test_processes_that_write_one_table_lose_nothing(tmp_path):
    path = tmp_path / "table.json"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(functools.partial(_store, path), range(24))
    assert set(tables.read(path)[1].calls) == {f"call {i}" for i in range(24)}
    assert not [p for p in tmp_path.iterdir() if p.suffix not in (".json", ".lock")]


def test_the_cache_folder_is_where_the_system_has_such(monkeypatch, tmp_path):
    monkeypatch.delenv("RESNET_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in tables.cache_folder().parents and "resnet_kernels" in str(tables.cache_folder())


SHIPPED = sorted((Path(rk.__file__).parent / "tuning").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_are_of_these_kernels(path):
    holds_for, table = tables.read(path)
    assert path.name == tables.file_of(holds_for)
    assert holds_for["kernels"] == tables.kernels_digest(), (
        "if no machine code changed, run `python tests/test_machine_code.py --retable`; else measure again"
    )
    assert table.calls and table.launches
    for row in table.launches.values():
        assert (row["config"] is None) == (row["kernel"] in (dispatch.SEPARATE, hopper.SM90_PAIR))
        config = None if row["config"] is None else configs.parse(row["config"])
        built = {hopper.SM90_TAIL: hopper.SM90_TAIL_CONFIG, **hopper.KERNELS}
        if row["kernel"] in built:
            assert config == built[row["kernel"]]
        else:
            assert row["kernel"] in ("boxes", "gather", dispatch.TRITON_TAIL, dispatch.SEPARATE, hopper.SM90_PAIR)


def test_no_kernel_has_an_f_string():
    """Python 3.12 made f-strings of other tokens: a digest of a kernel with one would depend on Python's version."""
    for name in tables._TUNED:
        for node in ast.parse((tables._GPU / f"{name}.py").read_text()).body:
            if isinstance(node, ast.FunctionDef) and "jit" in "".join(map(ast.unparse, node.decorator_list)):
                assert not any(isinstance(n, ast.JoinedStr) for n in ast.walk(node)), f"{name}: {node.name}"


def test_what_the_digest_is_of():
    """Tokens that Python 3.10 to 3.13 agree on: a syntax tree, and the text made of one, differ between them."""
    source = "@triton.jit\ndef kernel(x):\n    if x > 8:\n        x += 1.5e-3  # \u00b5\n\n    return x\n\n\nN = 1\n"
    assert list(tables._jitted_tokens(source)) == [
        *("@", "triton", ".", "jit", "NEWLINE", "def", "kernel", "(", "x", ")", ":", "NEWLINE"),
        *("INDENT", "if", "x", ">", "8", ":", "NEWLINE", "INDENT", "x", "+=", "1.5e-3", "NEWLINE", "DEDENT"),
        *("return", "x", "NEWLINE", "DEDENT"),
    ]


def test_the_digest_is_the_kernels_code_and_not_its_comments(tmp_path, monkeypatch):
    source = (
        "@triton.jit\ndef kernel(x):\n    '''Docs.'''\n    # Why.\n    return x + 1\n\ndef launcher():\n    return 1\n"
    )
    digests = []
    monkeypatch.setattr(tables, "_GPU", tmp_path)
    monkeypatch.setattr(tables, "_TUNED", ("kernel",))
    for text in (
        source,
        source.replace("Why", "Because").replace("Docs", "More docs"),
        source.replace("    ", "  ").replace("x + 1", "x+1  # one"),
        source.replace("return 1", "return 2"),
        source.replace("x + 1", "x + 2"),
    ):
        (tmp_path / "kernel.py").write_text(text)
        tables.kernels_digest.cache_clear()
        digests.append(tables.kernels_digest())
    tables.kernels_digest.cache_clear()
    assert digests[0] == digests[1] == digests[2] == digests[3] != digests[4]


# Launches


def problems(batch=256, arch=90):
    with torch.device("meta"):
        model, x = (
            torchvision.models.resnet50().eval().bfloat16(),
            torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16),
        )
    made = [m.problem for m in launches_of(model, x, arch) if m.problem is not None]
    return model, x, {p.key: p for p in made}


def test_a_measured_configuration_is_what_is_launched(h200, monkeypatch):
    """As a GPU would: recorded with the tables of the device."""
    model, x, found = problems()
    tail = next(p for p in found.values() if isinstance(p, Tail) and "64->256 56x56 + residual" in p.key)
    plain = next(p for p in found.values() if "1x1 2048->512 7x7" in p.key and not isinstance(p, Tail))
    other = Config(64, 128, 64, 4, 3)
    rows = [
        {"launch": tail.key, "kernel": dispatch.SEPARATE, "config": None},
        {"launch": plain.key, "kernel": "boxes", "config": dataclasses.asdict(other)},
    ]
    device = torch.device("cuda")
    identity = tables.identity(device)
    store(h200[1] / "t.json", identity, Table({}, {row["launch"]: row for row in rows}))
    with select.use_backend("gpu"), recording(90, device) as made:
        rk.freeze(model)(x)
    assert [m.problem.key for m in made if m.problem and m.problem.key == tail.key] == []
    chosen = [m for m in made if m.problem and m.problem.key == plain.key]
    assert chosen and all((m.arguments["BLOCK_N"], m.options["num_warps"]) == (128, 4) for m in chosen)
    with select.use_backend("gpu"), recording(90) as made:  # no tables: as always
        rk.freeze(model)(x)
    assert any(m.problem and m.problem.key == tail.key for m in made)


@pytest.mark.parametrize(
    "row",
    [
        {"kernel": "boxes", "config": {"BLOCK_M": 64}},
        {"kernel": "boxes", "config": dataclasses.asdict(Config(64, 128, 64, 4, 3)) | {"num_warps": "4"}},
        {"kernel": "boxes"},
    ],
)
def test_a_row_that_is_no_choice_is_ignored_with_a_warning(h200, row):
    _, _, found = problems()
    key, problem = next((k, p) for k, p in found.items() if not isinstance(p, Tail))
    identity = tables.identity(torch.device("cuda"))
    store(h200[1] / "t.json", identity, Table({}, {key: row | {"launch": key}}))
    with recording(90, torch.device("cuda")), pytest.warns(UserWarning, match="is ignored"):
        assert dispatch.convolution_candidates(problem)[0].config is not None


@pytest.mark.parametrize("row", [("of the future", Config(64, 64, 64, 4, 3)), ("boxes", None)])
def test_a_choice_nobody_knows_is_refused(row):
    _, _, found = problems()
    problem = next(p for p in found.values() if not isinstance(p, Tail))
    with recording(90):
        assert dispatch.check_candidate(problem, *row).why_not.startswith("unknown")


def test_keys_tell_apart_what_configurations_depend_on():
    """Sizes, strides, what is fused; not the numbers."""
    _, _, large = problems()
    _, _, small = problems(32)
    assert not set(large) & set(small)
    c = next(p for p in large.values() if not isinstance(p, Tail))
    assert c.key == dataclasses.replace(c, weight=c.weight.clone()).key
    strided = torch.empty_strided(
        c.x.shape, [2 * s for s in c.x.stride()[:1]] + list(c.x.stride()[1:]), dtype=c.x.dtype, device="meta"
    )
    changes = [{"relu": False}, {"shift": None}, {"x": strided}, {"geometry": Geometry(1, 1)}]
    assert len({c.key, *(dataclasses.replace(c, **change).key for change in changes)}) == 5


def test_candidates_are_many_and_within_the_limits():
    _, _, found = problems()
    for problem in found.values():
        with recording(90):
            ways = list(dispatch.candidates_to_measure(problem))
            assert len(ways) >= 5 and len({(w.kernel, w.config) for w in ways}) == len(ways)
            for way in ways:
                if way.config is not None:
                    made = dispatch.launch_candidate(problem, way)
                    assert made.grid > 0 and made.work.issued >= made.work.flops > 0


def test_compiled_ahead_is_what_compiles_here():
    """In processes of their own, with what does not compile told."""
    _, _, found = problems()
    problem = next(p for p in found.values() if "1x1 2048->512 7x7" in p.key)
    with recording(90):
        choice = dispatch.convolution_candidates(problem)[0]
        sound = dispatch.launch_candidate(problem, choice)
        config = dataclasses.replace(choice.config, num_warps=3)
        unsound = dispatch.launch_candidate(problem, dispatch.Candidate("boxes", config))
    first, second = ahead.compile_all([sound, unsound], 90, workers=2)
    assert first.matrix["wgmma"] > 0 and not first.wrong()
    assert isinstance(second, str) and second


# The tuner


@pytest.fixture
def small():
    model = randomize_(torchvision.models.resnet18()).eval()
    return model, torch.randn(2, 3, 32, 32)


def test_tune_chooses_the_fastest_that_is_right(folders, small, monkeypatch):
    """A backend that is wrong has no time, however fast it would be."""
    times = {"cpu": 2e-3, "library": 1e-3, "default": 2e-3, "measured": 1e-3}
    monkeypatch.setattr(tuner, "_time", lambda calls, device: {name: Sample(*3 * [times[name]], 5) for name in calls})
    model, x = small
    report = rk.tune(model, x)
    *steps, together = report.measured
    assert {m.chosen for m in steps} == {"library"} and together.chosen == "measured" and report.left == 0
    assert report.path.parent == folders[1] and "1000.0 us, 2.00x cpu" in str(report)
    assert {e.chosen for e in rk.explain(rk.freeze(model), x)} == {"library"}
    assert {e.chosen for e in rk.explain(rk.freeze(model), torch.randn(3, 3, 32, 32))} == {"cpu"}
    conv = library.conv
    monkeypatch.setattr(library, "conv", lambda *args: (conv(*args)[0] * 1.01, None))
    report = rk.tune(model, x, again=True)
    assert {m.chosen for m in report.measured} == {"cpu"}  # nothing is left to be compared together
    assert all("wrong: rms" in m.out["library"] and "library" not in m.seconds for m in report.measured)
    assert {e.chosen for e in rk.explain(rk.freeze(model), x)} == {"cpu"}


def test_steps_of_a_trunk_compute_in_one_dtype(folders, small):
    """Where a backend computes 16 bits in fp32 and another does not, only one of them is a candidate."""
    model, x = small
    report = rk.tune(model.bfloat16(), x.bfloat16())
    own = {name for m in report.measured for name in m.seconds if name in select.BY_NAME}
    dtypes = {select.BY_NAME[name].compute_dtype(torch.bfloat16) for name in own or {"cpu"}}
    assert len(dtypes) == 1
    assert rk.freeze(model)(x.bfloat16()).isfinite().all()


def test_choices_that_lose_together_are_dropped(folders, small, monkeypatch):
    times = {"cpu": 2e-3, "library": 1e-3, "default": 1e-3, "measured": 1e-3}
    monkeypatch.setattr(tuner, "_time", lambda calls, device: {name: Sample(*3 * [times[name]], 5) for name in calls})
    model, x = small
    report = rk.tune(model, x)
    assert report.measured[-1].chosen == "default" and report.measured[0].chosen == "library"
    assert {e.chosen for e in rk.explain(rk.freeze(model), x)} == {"cpu"}
    assert {row.get("alone") for row in tables.read(report.path)[1].calls.values()} == {"library", None}
    assert rk.tune(model, x).left == 0 and rk.tune(model, x).measured == ()


@pytest.mark.parametrize(
    "median, p80, chosen",
    [(0.9, 0.95, "new"), (0.99, 0.995, "old"), (0.9, 1.1, "old")],
    ids=["faster", "level", "noisy"],
)
def test_a_challenger_must_be_faster_by_more_than_noise(median, p80, chosen):
    samples = {"old": Sample(1.0, 0.95, 1.2, 9), "new": Sample(median, 0.8, p80, 9)}
    assert tuner._best(samples, "old") == chosen
    assert tuner._best({"new": samples["new"]}, "old") == "new"


def test_tune_goes_on_where_it_was_cut_off(folders, small):
    model, x = small
    first = rk.tune(model, x, budget=0)
    assert first.measured == () and first.left > 5 and not first.path.exists()
    path = first.path
    whole = rk.tune(model, x)
    content = json.loads(path.read_text())
    content["calls"] = content["calls"][:2]
    path.write_text(json.dumps(content))
    second = rk.tune(model, x)
    assert second.kept == 2 and len(second.measured) == len(whole.measured) - 2 and second.left == 0
    assert rk.tune(model, x).measured == ()


def test_what_is_tuned_is_left_as_it_was_and_computes_the_same(folders, small):
    model, x = small
    state = {name: t.clone() for name, t in model.state_dict().items()}
    frozen = rk.freeze(model)
    want, graphs = frozen(x), frozen.net.graphs
    rk.tune(frozen, x)
    assert frozen.net.graphs is graphs and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not frozen.net.trunk._forward_pre_hooks
    torch.testing.assert_close(rk.freeze(model)(x), want, rtol=1e-4, atol=1e-4)


def test_nothing_is_measured_unasked(folders, small, monkeypatch):
    model, x = small
    monkeypatch.setattr(tuner, "_time", lambda *args: pytest.fail("measured"))
    rk.freeze(model)(x)
    assert not list(folders[1].iterdir())


def test_tune_refuses_what_freeze_refuses(folders, small):
    with pytest.raises(ValueError, match="expected it in evaluation mode"):
        rk.tune(small[0].train(), small[1])


def test_tune_tells_where_no_cache_folder_is_known(monkeypatch, small):
    monkeypatch.delenv("RESNET_KERNELS_CACHE", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.raises(ModuleNotFoundError, match="platformdirs, or RESNET_KERNELS_CACHE"):
        rk.tune(*small)


def test_tune_by_command(folders):
    """With a progress bar, and a table in the folder."""
    command = [
        sys.executable,
        "-m",
        "resnet_kernels.cli",
        "tune",
        "--model",
        "resnet18",
        "--size",
        "32",
        "--batch",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "choices measured" in done.stdout and list(folders[1].glob("*.json"))


@pytest.mark.interpreted
def test_launches_are_tuned_and_run_as_measured(folders):
    """In the interpreter: every way of a bottleneck's tail and of its convolutions is right."""
    chain = torch.nn.Sequential(rk.nn.Bottleneck(256, 64), rk.nn.Bottleneck(256, 64))
    model, x = randomize_(chain).eval().half(), torch.relu(torch.randn(1, 256, 16, 16)).half()
    path = folders[1] / "t.json"
    with rk.use_backend("gpu"), assume_arch(90):
        report = rk.tune(model, x, path=path, candidates=1)
        assert all(m.seconds and not m.out for m in report.measured)
        assert any(set(m.seconds) > {dispatch.SEPARATE} and len(m.seconds) >= 3 for m in report.measured)
        rows = tables.read(path)[1].launches
        tails = [row for key, row in rows.items() if " > " in key]
        assert tails and {row["kernel"] for row in rows.values()} <= {
            "boxes",
            "gather",
            dispatch.SEPARATE,
            dispatch.TRITON_TAIL,
            dispatch.CONSECUTIVE_TAILS,
        }
        want = rk.freeze(model)(x)
        for row in tails:
            row |= {"kernel": dispatch.SEPARATE, "config": None}
        identity = tables.identity(x.device)
        store(path, identity, Table({}, rows))
        torch.testing.assert_close(rk.freeze(model)(x), want, rtol=2e-3, atol=2e-3)


@pytest.mark.interpreted
def test_a_wrong_configuration_is_out(folders, monkeypatch):
    model, x = randomize_(rk.nn.Bottleneck(64, 16)).eval().half(), torch.relu(torch.randn(1, 64, 4, 4)).half()
    real = launches.run_candidate
    monkeypatch.setattr(
        launches, "run_candidate", lambda p, c: [y * (1.1 if c.config.num_warps == 8 else 1) for y in real(p, c)]
    )
    with rk.use_backend("gpu"), assume_arch(90):
        report = rk.tune(torch.nn.Sequential(model), x, path=folders[1] / "t.json", candidates=4)
    ours = [m for m in report.measured if "->" in m.what]
    assert any("wrong: " in reason for m in ours for reason in m.out.values())
    assert not any("8 warps" in m.chosen for m in ours)


def test_configurations_are_parsed_strictly():
    config = Config(64, 128, 64, 4, 3, True, ".ca")
    assert configs.parse(dataclasses.asdict(config)) == config
    with pytest.raises(ValueError, match="expected a configuration of BLOCK_M"):
        configs.parse({"BLOCK_M": 64})
