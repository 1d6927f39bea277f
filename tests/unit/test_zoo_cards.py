"""What ships of the zoo, and the cards that tell of it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from jambascope import HookedJamba
from jambascope.config import JambaConfig
from jambascope.errors import ConfigError
from jambascope.files import write_json
from jambascope.studies.zoo import cards, jobs, records, ship
from jambascope.studies.zoo.evaluation import find_runs
from jambascope.studies.zoo.report import HEADLINE, number
from jambascope.studies.zoo.summary import Row, table
from jambascope.training import TrainingSpec
from jambascope.zoo import recipes
from jambascope.zoo.language import DOMAINS
from jambascope.zoo.train import RECORD
from jambascope.zoo.train import train as train_model
from jambascope.zoo.words import VOCABULARY

SHAPE = dict(
    d_model=16, d_vocab=len(VOCABULARY), n_heads=2, n_key_value_heads=1, d_head=8, d_mlp=16, d_inner=32, d_state=4,
    n_ctx=64, bos_token_id=1, eos_token_ids=(2,), pad_token_id=0,
)  # fmt: skip
LOSSES = {0: 3.125, 1: 3.75, 2: 3.5}
ERROR = "learning_rate=0.002: the loss became nan at step 1; lower it and start anew"


def recipe(about: str, packaged: bool = True, **config) -> recipes.Recipe:
    stages = (
        recipes.Stage(until=1, batch_size=2, sequence_length=12, shares={"repeat": 1.0}),
        recipes.Stage(until=None, batch_size=2, sequence_length=32),
    )
    spec = TrainingSpec(steps=2, learning_rate=1e-3, warmup_steps=1)
    config = JambaConfig(**SHAPE, **config)
    return recipes.Recipe(about=about, config=config, spec=spec, stages=stages, packaged=packaged)


TINY = {
    "jamba-micro": recipe(
        "a tiny hybrid",
        mixers=("mamba", "attention"),
        feed_forwards=("moe", "dense"),
        num_experts=3,
        experts_per_token=2,
    ),
    "mamba-micro": recipe("no attention", mixers=("mamba", "mamba"), feed_forwards=("dense", "dense")),
    "control": recipe("stays here", packaged=False, mixers=("mamba",), feed_forwards=("none",)),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of each packaged recipe, trained for two steps."""
    runs = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "RECIPES", TINY)
        patch.setattr("jambascope.zoo.progress.summary", lambda model: {"held_out": 3.0})
        for name in ("jamba-micro", "mamba-micro"):
            train_model(name, runs / name)
    return runs


@pytest.fixture
def runs(trained, tmp_path, monkeypatch) -> Path:
    """Three seeds and a failed one of jamba-micro after a search, one seed of mamba-micro without; all evaluated."""
    monkeypatch.setattr(recipes, "RECIPES", TINY)
    found = tmp_path / "runs"
    for seed, loss in LOSSES.items():
        add_run(trained, found, "jamba-micro", seed, loss, 2e-3)
    add_run(trained, found, "mamba-micro", 0, 2.0, 1e-3)
    spec = json.loads((found / "jamba-micro" / "seed-0" / RECORD).read_text())["spec"]
    (found / "jamba-micro" / "seed-7").mkdir()
    write_json(found / "jamba-micro" / "seed-7" / jobs.FAILED, {"spec": spec | {"seed": 7}, "step": 1, "error": ERROR})
    results = [
        {"learning_rate": 1e-3, "held_out": 4.321, "seconds": 60.0, "error": None},
        {"learning_rate": 2e-3, "held_out": 4.123, "seconds": 66.0, "error": None},
        {"learning_rate": 4e-3, "held_out": None, "seconds": 0.0, "error": "the loss became inf at step 0"},
    ]
    outcome = {"name": "jamba-micro", "seed": 0, "steps": 1, "chosen": 2e-3, "results": results}
    write_json(found / "jamba-micro" / "search.json", outcome)
    write_results(found)
    return found


def add_run(trained: Path, runs: Path, name: str, seed: int, held_out: float, rate: float) -> None:
    directory = runs / name / f"seed-{seed}"
    shutil.copytree(trained / name, directory, ignore=shutil.ignore_patterns("training"))
    record = json.loads((directory / RECORD).read_text())
    record["spec"] |= {"seed": seed, "learning_rate": rate}
    record["evaluation"]["held_out"] = held_out
    write_json(directory / RECORD, record)


def results_rows() -> list[Row]:
    """Numbers of every headline, all different."""
    rows = []
    for name, seeds in (("jamba-micro", [*LOSSES, None]), ("mamba-micro", [0])):
        for i, (_, task, condition, x, measure) in enumerate(HEADLINE):
            for j, seed in enumerate(seeds):
                mean = (i + 1) * 0.04 + j * 0.01
                where = (name, seed, None, task, condition, None, x, measure)
                rows.append(Row(*where, mean, mean - 0.4, mean + 0.4, 96, 3 if seed is None else 1))
    chance = ("jamba-micro", 0, None, "recall", "up to 8 questions", "pairs", 16, "chance")
    return [*rows, Row(*chance, 0.0625, 0.0625, 0.0625, 96, 1)]


def write_results(runs: Path) -> None:
    out = runs / "evaluation"
    out.mkdir(exist_ok=True)
    ship_directories = [path for name in ("jamba-micro", "mamba-micro") for path in (runs / name).glob("seed-[012]")]
    models = [dataclasses.asdict(find_runs([str(path)])[0]) | {"directory": str(path)} for path in ship_directories]
    for model, path in zip(models, ship_directories, strict=True):
        model["model"] = path.parent.name
    write_json(out / "spec.json", {"models": models})
    records.pq.write_table(table(results_rows()), out / "results.parquet")


def test_the_typical_seed_ships_with_all_that_it_needs(runs, tmp_path):
    package = tmp_path / "package"
    (package / "jamba-micro").mkdir(parents=True)
    (package / "jamba-micro" / "of-before.txt").write_text("")
    shipments = ship.ship(runs, runs / "evaluation", package)
    assert [(s.name, s.training.job.seed) for s in shipments] == [("jamba-micro", 2), ("mamba-micro", 0)]
    assert {path.name for path in package.iterdir()} == {"jamba-micro", "mamba-micro"}
    for shipment in shipments:
        directory = package / shipment.name
        assert {path.name for path in directory.iterdir()} == {*ship.FILES, "README.md"}
        for file in ship.FILES:
            assert (directory / file).read_bytes() == (shipment.training.job.directory / file).read_bytes()
        assert sum((directory / file).stat().st_size for file in ship.FILES) == shipment.size
        assert HookedJamba.from_pretrained(directory).generate(cards.PROMPT, max_new_tokens=1)
    assert json.loads((package / "jamba-micro" / RECORD).read_text())["spec"]["seed"] == 2


def test_the_command_prints_what_shipped(runs, tmp_path, monkeypatch, capsys):
    options = ["--runs", str(runs), "--evaluation", str(runs / "evaluation"), "--package", str(tmp_path / "package")]
    monkeypatch.setattr("sys.argv", ["ship", *options])
    ship.main()
    assert re.fullmatch(
        r"jamba-micro: seed 2, \S+ KiB\nmamba-micro: seed 0, \S+ KiB\ntogether \S+ KiB\n", capsys.readouterr().out
    )
    monkeypatch.setattr("sys.argv", ["ship", "control", *options])
    with pytest.raises(SystemExit, match="ship: 'control' is no packaged recipe"):
        ship.main()


@pytest.mark.parametrize(
    ("losses", "seed"),
    [({0: 3.0}, 0), ({0: 3.0, 1: 2.0}, 0), ({0: 1.0, 1: 3.0, 2: 2.0}, 2), ({0: 1.0, 1: 4.0, 2: 2.0, 3: 3.0}, 3)],
    ids=lambda value: f"{len(value)} seeds" if isinstance(value, dict) else "",
)
def test_the_typical_run_is_the_median(losses, seed):
    job = jobs.Job(name="jamba-micro", directory=Path("seed-9"), seed=9, learning_rate=1e-3)
    found = [
        records.Training(dataclasses.replace(job, seed=s), jobs.State(kind="finished", held_out=loss), {})
        for s, loss in losses.items()
    ]
    failed = records.Training(job, jobs.State(kind="failed"), {})
    assert records.typical([failed, *found]).job.seed == seed


def test_the_card_holds_every_run_and_every_number(runs, tmp_path):
    ship.ship(runs, runs / "evaluation", tmp_path / "package")
    card = (tmp_path / "package" / "jamba-micro" / "README.md").read_text()
    assert "{" not in card and "}" not in card
    for i, (title, *_) in enumerate(HEADLINE):
        cells = [" ".join(number(row)) for row in results_rows()[4 * i : 4 * i + 4]]
        chance = "0.06" if title.startswith("recall") else "-"
        assert f"| {' | '.join([title, *cells])} | 96 | {chance} |" in card
    assert "| | seed 0 | seed 1 | seed 2 | all seeds | n | chance |" in card
    for line in (
        "A tiny hybrid.",
        "| 0 | 3.125 | 0 |  |",
        "| 1 | 3.750 | 0 |  |",
        "| 2 | 3.500 | 0 | ships |",
        f"| 7 | failed |  | {ERROR} |",
        "| 0.001 | 4.321 | 1.0 |  |",
        "| 0.002 | 4.123 | 1.1 | chosen |",
        "| 0.004 | failed: the loss became inf at step 0 | 0.0 |  |",
        "    jambascope zoo train jamba-micro --out DIR --seed 2 --learning-rate 0.002\n",
        "2 steps, 88 tokens,",
        "| 0-0 | 2 x 12 | repeat only |",
        "| 1-1 | 2 x 32 | all domains |",
        "| experts | at layer 0: 3, of which a token takes 2 |",
        "| layer | 0 | 1 | 2 | CV |",
        "library_name: transformers",
    ):
        assert line in card
    assert all(f"| {domain} | " in card for domain in DOMAINS)


def test_a_card_of_one_seed_without_search_or_experts(runs, tmp_path):
    ship.ship(runs, runs / "evaluation", tmp_path / "package", ["mamba-micro"])
    card = (tmp_path / "package" / "mamba-micro" / "README.md").read_text()
    assert "| | seed 0 | n | chance |\n" in card and "all seeds" not in card
    assert "No search was made for this model; 0.001 is its recipe's." in card
    assert "    jambascope zoo train mamba-micro --out DIR\n" in card
    assert "Router" not in card and "| attention |" not in card and "| Mamba | at every layer: 32 channels" in card
    assert "- One seed: " in card
    assert not (tmp_path / "package" / "jamba-micro").exists()


def change_weights(runs: Path) -> None:
    path = runs / "mamba-micro" / "seed-0" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_the_search(runs: Path) -> None:
    path = runs / "jamba-micro" / "search.json"
    write_json(path, json.loads(path.read_text()) | {"chosen": 4e-3})


def lose_a_number(runs: Path) -> None:
    records.pq.write_table(table(results_rows()[:-2]), runs / "evaluation" / "results.parquet")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            change_weights,
            r"is of other weights of mamba-micro than .* \(seed 0\); evaluate again, all of them, with: jambascope zoo",
        ),
        (change_the_search, "jamba-micro are not of one learning rate, but of 0.002, 0.004; move the odd ones away"),
        (lose_a_number, "has no 'loss on answers' of mamba-micro of seed 0"),
        (lambda runs: shutil.rmtree(runs / "evaluation"), "holds no results of `zoo eval`"),
        (lambda runs: shutil.rmtree(runs / "mamba-micro"), "holds no finished seed; train it with"),
        (lambda runs: (runs / "mamba-micro/seed-0/tokenizer.json").unlink(), "lacks tokenizer.json; train it anew"),
    ],
    ids=["other weights", "another rate", "a number missing", "no results", "not trained", "half a run"],
)
def test_nothing_ships_unless_everything_is_there(runs, tmp_path, damage, message):
    damage(runs)
    with pytest.raises(ConfigError, match=message):
        ship.ship(runs, runs / "evaluation", tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_too_large_a_package_and_unknown_names_are_refused(runs, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'control' is no packaged recipe"):
        ship.ship(runs, runs / "evaluation", tmp_path / "package", ["control"])
    ship.ship(runs, runs / "evaluation", tmp_path / "package", ["jamba-micro"])
    monkeypatch.setattr(ship, "MOST_BYTES", 100_000)  # a model takes some 60 kB
    with pytest.raises(ConfigError, match=r"would take 1\d\d,\d\d\d bytes, more than 100,000"):
        ship.ship(runs, runs / "evaluation", tmp_path / "package", ["mamba-micro"])
    assert not (tmp_path / "package" / "mamba-micro").exists()


@pytest.mark.parametrize(
    ("chosen", "at_the_end"), [(1e-3, True), (2e-3, False), (4e-3, True)], ids=["lowest", "middle", "highest"]
)
def test_a_rate_at_the_end_of_the_search_is_told(chosen, at_the_end):
    results = [{"learning_rate": rate, "held_out": 4.0, "seconds": 1.0} for rate in (1e-3, 2e-3, 4e-3)]
    told = cards._search({"seed": 0, "steps": 1, "chosen": chosen, "results": results}, chosen)
    assert ("one beyond might be better" in " ".join(told.split())) == at_the_end


def test_only_of_several_seeds_the_typical_ships():
    searched = {"seed": 0}
    assert "typical" not in cards._ships(1, None) and "flattered" not in cards._ships(3, None)
    assert "seed 0 is the one that the search chose" in cards._ships(1, searched)
    assert "median held-out loss, so" in cards._ships(3, searched)
    assert "(of the two in the middle the worse)" in cards._ships(2, searched)


def test_stages_tell_what_differs_from_the_last():
    last = recipes.Stage(until=None, batch_size=1, sequence_length=8, shares={"repeat": 0.5, "review": 0.5})
    options = {"review": {"classes": 2, "filler": 0}}
    stage = dataclasses.replace(last, shares={"repeat": 0.5, "review": 0.75}, options=options)
    assert cards._documents(stage, last) == "all domains; review 60%; review with classes 2, filler 0"
    only = dataclasses.replace(last, shares={"repeat": 1.0}, options={"repeat": {"longest": 16}})
    assert cards._documents(only, last) == "repeat only; repeat with longest 16"
    assert cards._documents(last, last) == "all domains"


def test_every_domain_is_described():
    assert cards.ABOUT.keys() == DOMAINS.keys()
