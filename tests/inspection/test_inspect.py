"""`peanut-inspect`: the layout and its evidence, shapes per module, and a plot of the size of the updates."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.commands import Run
from support.golden import CASES, GLUE, LLM, Golden
from support.method_zoo import CASES as ZOO
from support.paths import DATA
from support.peft_methods import MODELS, train
from support.tiny_models import Pair, save_on_parameters, tiny_mixtral

from converters import load_adapter
from converters.errors import MissingDependencyError, OptionError, OutputExistsError
from converters.inspection import plot
from converters.inspection.norms import DeltaNorm, norm_table

REAL = DATA / "vit-tiny" / "authors-digits5to9"
REAL_BASE = DATA / "vit-tiny" / "base"

EVIDENCE = {
    "authors-llm": (
        "authors-llm or lora: only the shapes of the base decide",
        "every lora_B is (d, r) with lora_A (r, d)",
    ),
    "authors-vision": ("authors-vision", "has keys like vit.encoder.layer.0.attention.attention."),
    "authors-nlu": ("authors-glue", ".attention.self."),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_names_the_layout_and_the_evidence(case: Golden, run_here: Run) -> None:
    options = [f"--{name}={value}" for name, value in case.options.items()]
    facts = json.loads(run_here("peanut-inspect", case.adapter, *options, "--json").stdout)
    layout, evidence = EVIDENCE[case.folder.parent.name]
    assert facts["layout"] == layout
    assert evidence in facts["evidence"]
    assert ("inside a whole model" in facts["evidence"]) == (case.file == "full_state_dict.bin")
    assert (facts["base_weights_inside"] > 0) == (case.file == "full_state_dict.bin")


def test_shapes_per_module(run_here: Run) -> None:
    facts = json.loads(run_here("peanut-inspect", REAL, "--json").stdout)
    shapes = facts["shapes"]["vit.encoder.layer.3.output.dense"]
    assert shapes == {"A": [8, 192], "B": [192, 8], "r": 8, "depth": 1, "scaling": 1.0}
    assert facts["depth"] == [1, 2]
    shown = run_here("peanut-inspect", REAL, "--base", REAL_BASE).stdout
    rows = {" ".join(line.replace("│", " ").split()) for line in shown.splitlines()}
    assert "intermediate.dense [8, 768] [768, 8] 8 1 6" in rows  # one row for all identical layers
    assert "attention.query [8, 192] [192, 8] 8 2 6" in rows
    assert any(row.startswith("layer.5 0.") for row in rows)
    assert "…" not in shown


def test_a_base_resolves_what_the_folder_leaves_open(run_here: Run) -> None:
    adapter, base = LLM / "gqa" / "adapter", LLM / "gqa" / "base"
    assert run_here("peanut-inspect", adapter, "--base", base).returncode == 0
    facts = json.loads(run_here("peanut-inspect", adapter, "--layout", "authors-llm", "--json").stdout)
    assert facts["layout"] == "authors-llm"


def test_the_plot_is_drawn(tmp_path: Path, run_here: Run) -> None:
    from matplotlib import image

    file = tmp_path / "where.png"
    done = run_here("peanut-inspect", REAL, "--base", REAL_BASE, "--plot", file)
    assert done.returncode == 0, done.stderr
    pixels = image.imread(file)
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 400
    assert len({tuple(colour) for colour in pixels.reshape(-1, pixels.shape[2]).tolist()}) > 24  # one cell each


def test_the_plot_contains_the_norms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(
        Axes, "imshow", lambda axes, grid, right=Axes.imshow, **k: drawn.append(grid) or right(axes, grid, **k)
    )
    norms = [DeltaNorm(f"layers.{i}.{kind}", (2, 2), i + n, 2.0) for i in (9, 10) for n, kind in enumerate("qv")]
    plot.plot_norms([*norms, DeltaNorm("layers.10.k", (2, 2), 3.0, 2.0)], "title", tmp_path / "a.svg")
    grid = torch.tensor(drawn[0])
    assert torch.equal(grid.nan_to_num(-1), torch.tensor([[-1, 1.5], [4.5, 5.0], [5.0, 5.5]]))  # k, q, v
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_kinds_that_would_be_confused_keep_their_names() -> None:
    modules = ["a.0.x.dense", "a.0.y.dense", "head"]
    layers, kinds, cells = norm_table([DeltaNorm(module, (1, 1), i, 1) for i, module in enumerate(modules)])
    assert (layers, kinds) == (["a.0", ""], ["head", "x.dense", "y.dense"])
    assert cells["a.0"] == {"x.dense": 0, "y.dense": 1}


def test_a_plot_that_cannot_be_written_is_refused_first(pair: Pair, tmp_path: Path, run_here: Run) -> None:
    taken = tmp_path / "taken.png"
    taken.write_text("mine")
    for file, error, message in (
        (taken, OutputExistsError, "exists; choose another file"),
        (tmp_path / "a.docx", OptionError, "'.docx' is not a supported format; expected one of .*png"),
        (tmp_path / "nowhere" / "a.png", OptionError, "there is no folder"),
    ):
        with pytest.raises(error, match=message):
            plot.check_plot(file)
    assert taken.read_text() == "mine"
    done = run_here("peanut-inspect", pair.adapter, "--plot", tmp_path / "b.png")
    assert done.stderr == "peanut-inspect: --plot needs --base\n"


def test_without_matplotlib_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'peanut-serve\[plot\]'"):
        plot.check_plot(tmp_path / "a.png")


def test_the_base_inside_the_adapter(tmp_path: Path, run_here: Run) -> None:
    case = Golden(GLUE / "peanut_l_scale0.1", "full_state_dict.bin")
    (tmp_path / "config.json").write_text((case.base / "config.json").read_text())
    (tmp_path / "run.bin").write_bytes(case.adapter.read_bytes())
    command = ["peanut-inspect", tmp_path / "run.bin", "--base", "self", "--scaling", "0.1", "--json"]
    own = json.loads(run_here(*command).stdout)["norms"]
    given = json.loads(run_here(*command[:3], case.base, *command[4:]).stdout)["norms"]
    assert own == given
    assert len(own) == 4
    assert load_adapter(tmp_path / "run.bin", scaling=0.1).embedded


def test_the_layouts_are_listed_in_the_help_and_are_those_that_exist(run_here: Run) -> None:
    from converters.adapters.layouts.names import LAYOUT_SUMMARIES
    from converters.adapters.layouts.table import LAYOUTS

    assert {layout.name for layout in LAYOUTS} == set(LAYOUT_SUMMARIES)
    for command in ("peanut-merge", "peanut-inspect"):
        shown = run_here(command, "--help").stdout
        for name, summary in LAYOUT_SUMMARIES.items():
            assert f"  {name:20} {summary}" in shown


def test_an_adapter_can_be_inspected_without_its_scale(run_here: Run) -> None:
    theta = GLUE / "peanut_l_scale0.1" / "theta.safetensors"
    facts = json.loads(run_here("peanut-inspect", theta, "--json").stdout)
    assert (facts["layout"], facts["r"], facts["modules"]) == ("authors-glue", 8, 4)
    assert (facts["scaling"], facts["digest"]) == ("not stored: to merge it, give --scaling", None)
    refused = run_here("peanut-inspect", theta, "--base", theta.parent / "base")
    assert "does not save the scale s: give --scaling" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", ["plot", "record"])
def test_a_full_disk_is_reported_in_one_line(what: str, pair: Pair, tmp_path: Path) -> None:
    """The file size limit is a few bytes."""
    program = Path(sys.executable).parent / "peanut-inspect"
    option = ["--plot", tmp_path / "a.png"] if what == "plot" else ["--record-base"]
    done = subprocess.run(
        [program, pair.adapter, "--base", pair.base, *option],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20)),
    )
    assert done.returncode == 1
    assert "could not be" in done.stderr
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def methods_of(run_here: Run, tmp_path: Path, name: str) -> tuple[dict[str, dict[str, object]], str]:
    """What `peanut-inspect` says of an adapter of the zoo, per module, as JSON and in words."""
    train(MODELS["bert"](), ZOO[name].on("bert"), tmp_path / "base", tmp_path / "adapter")
    shown = run_here("peanut-inspect", tmp_path / "adapter").stdout
    words = shown[shown.index("what each module does") : shown.index("shapes of θ")]
    facts = json.loads(run_here("peanut-inspect", tmp_path / "adapter", "--json").stdout)
    return facts["methods"], words


@pytest.mark.parametrize(
    ("name", "reads", "rank", "changes_bias", "settings"),
    [
        ("vera", "nothing", 4, False, {}),
        ("hra", "rows", 4, False, {"apply_GS": False}),
        ("road 2", "columns", None, True, {"variant": "road_2"}),
        ("loha full", "nothing", None, False, {}),
        ("hira", "rows", None, False, {}),
    ],
)
def test_methods_per_module(
    name: str,
    reads: str,
    rank: int | None,
    changes_bias: bool,
    settings: dict[str, object],
    tmp_path: Path,
    run_here: Run,
) -> None:
    """Method, what it reads of W0, exact rank or why it has none, settings: as the methods themselves say."""
    methods, words = methods_of(run_here, tmp_path, name)
    opened = load_adapter(tmp_path / "adapter")
    assert methods.keys() == opened.modules.keys()
    for module, facts in methods.items():
        method = opened.method(module)
        assert (facts["method"], facts["reads"], facts["rank"]) == (name.split()[0], reads, rank)
        assert facts["full_rank_reason"] == method.full_rank_reason
        assert (facts["full_rank_reason"] is None) == (rank is not None)
        assert facts["changes_bias"] == changes_bias
        assert facts["settings"] == {
            key: value for key, value in method.settings.items() if (key, value) != ("r", rank)
        }
        assert settings.items() <= facts["settings"].items()
    method = name.split()[0] + (" of weight and bias" if changes_bias else "")
    assert f"  query (2 layers): {method}; reads of W0: {reads}; " in words
    assert f"; exact rank {rank}" in words if rank else "; no exact rank: the update " in words
    assert all(f"; {key} = {value}" in words for key, value in settings.items())


def test_the_rank_of_experts_is_that_of_each(tmp_path: Path, run_here: Run) -> None:
    """`--format lora` writes them exactly, so they have one."""
    save_on_parameters(tiny_mixtral(), tmp_path / "adapter", r=3, target_modules=["q_proj"])
    facts = json.loads(run_here("peanut-inspect", tmp_path / "adapter", "--json").stdout)["methods"]
    ranks = {
        module.rpartition("self_attn.")[2]: (one["rank"], one["rank_of_each_expert"], one["full_rank_reason"])
        for module, one in facts.items()
    }
    experts = "model.layers.0.mlp.experts"
    assert ranks == {
        "q_proj": (3, False, None),
        experts: (3, True, None),
        f"{experts}.base_layer": (3, True, None),
    }
    words = " ".join(run_here("peanut-inspect", tmp_path / "adapter").stdout.split())
    assert words.count("exact rank 3 of each expert; scaling = 1.66667, experts = 4") == 2
    assert "exact rank 3; " in words
    assert "no exact rank" not in words


def test_a_scale_that_is_not_stored_is_not_made_up(run_here: Run) -> None:
    theta = GLUE / "peanut_l_scale0.1" / "theta.safetensors"
    facts = json.loads(run_here("peanut-inspect", theta, "--json").stdout)
    assert {one["settings"]["scaling"] for one in facts["methods"].values()} == {"not stored"}
    assert {one["scaling"] for one in facts["shapes"].values()} == {"not stored"}
    assert "scaling = not stored" in " ".join(run_here("peanut-inspect", theta).stdout.replace("│", " ").split())
