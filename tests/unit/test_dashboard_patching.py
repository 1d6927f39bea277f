"""The Patching page without a browser: what it asks, its maps, one cell against the sweep, and the program it shows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.dashboards import session, widgets
from jambascope.dashboards.models import Checkpoint
from jambascope.dashboards.results import patching as results
from jambascope.dashboards.results import patching_code, prompt_pairs
from jambascope.dashboards.results import patching_maps as maps
from jambascope.dashboards.results import patching_run as saving
from jambascope.dashboards.results.patching import CHANGE, EFFECT, METRICS, VALUE, Asked, Cell
from jambascope.errors import InputError
from jambascope.studies.figures import patching as figures
from jambascope.zoo.words import VOCABULARY

NAN = np.nan
SIZES = dict(d_model=16, d_vocab=20, d_inner=32, d_state=4, d_mlp=8, n_heads=2, n_key_value_heads=1, d_head=8)
PURE = {
    "mamba": JambaConfig(mixers=("mamba",) * 2, feed_forwards=("none",) * 2, **SIZES),
    "mamba2": JambaConfig(
        mixers=("mamba2", "attention"), feed_forwards=("none", "moe"), num_experts=2, mamba_d_head=8, **SIZES
    ),
    "attention": JambaConfig(mixers=("attention",) * 2, feed_forwards=("dense",) * 2, **SIZES),
}


@pytest.fixture(scope="module")
def packaged() -> HookedJamba:
    return HookedJamba.from_pretrained("jamba-micro")


@pytest.fixture(scope="module")
def views(packaged) -> tuple[session.View, session.View]:
    """A short clean prompt and its corrupted one."""
    return tuple(view_of(packaged, f"map : stone river , leaf mud ; {word} ->") for word in ("leaf", "stone"))


def view_of(model: HookedJamba, prompt: str) -> session.View:
    ids = tuple(model.to_tokens(prompt)[0].tolist())
    checkpoint = Checkpoint("jamba-micro", 0, None, None)
    return session.View(
        model, checkpoint, prompt, ids, tuple(model.to_str_tokens(prompt)), "jamba-micro", "jamba-micro"
    )


def ask(view: session.View, other: session.View, **changes) -> Asked:
    correct, wrong = results.first_tokens(view, other)
    whole = dict(
        metric=results.DIFFERENCE, correct=correct, wrong=wrong, labels=(correct, wrong), kinds=("resid_pre", "z"),
        window=2, direction="denoise", layers=(0, 7), positions=(0, len(view.ids) - 1),
    )  # fmt: skip
    return Asked(**whole | changes)


def swept(view, other, asked, stop_at: float = 2.0):
    return results.computing(view, other, asked)(lambda share, text="", value=None: share < stop_at)


# -- prompts -----------------------------------------------------------------------------------------------------


def test_example_pairs_differ_and_are_of_one_length(packaged):
    for clean, corrupted in prompt_pairs.pairs_of(packaged, ()).values():
        assert clean != corrupted and len(clean.split()) == len(corrupted.split())
        assert set(corrupted.split()) <= VOCABULARY.keys()


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        (prompt_pairs.GIFT, prompt_pairs.PAIRS["who gave it"][1]),
        ("it was gripping . it was dull", "it was gripping . it was thrilling"),
        ("Yes  is\nNo : Bob", "Yes  is\nYes : Bob"),
        ("a lamp for Bob", "a lamp for Clara"),
        ("<unk> a rope", "<unk> a book"),
        ("nothing of it", "nothing of it"),
        ("", ""),
    ],
)
def test_a_counterpart_changes_one_word(packaged, prompt, wanted):
    found = prompt_pairs.counterpart(packaged, prompt)
    assert found == wanted
    assert sum(a != b for a, b in zip(prompt.split(), found.split(), strict=True)) <= 1


def test_a_counterpart_of_token_ids_changes_one():
    model = SimpleNamespace(tokenizer=None, config=SimpleNamespace(d_vocab=6))
    assert prompt_pairs.counterpart(model, "1 5 3") == "1 0 3"
    assert prompt_pairs.counterpart(model, "not ids") == "not ids"
    assert prompt_pairs.pairs_of(model, ["1 2"]) == {"one token of 2": ("1 2", "1 3")}


def test_aligned_prompts_mark_what_differs_and_are_text():
    shown = prompt_pairs.aligned(["a", '"<script>"'], ["a", "b", "c"])
    assert shown.count('class="other"') == 2 and shown.count('class="same"') == 1
    assert "<script" not in shown and "&lt;script" in shown and "—" in shown


def test_prompts_that_do_not_correspond_are_refused(packaged):
    clean, longer = view_of(packaged, "a book"), view_of(packaged, "a big book")
    with pytest.raises(InputError, match=r"has 3 tokens and the corrupted one 4; .*shorten .* by 1 \(they part at 2\)"):
        results.differing(clean, longer)
    with pytest.raises(InputError, match="lengthen the corrupted one by 1"):
        results.differing(longer, clean)
    with pytest.raises(InputError, match="are the same; change a word"):
        results.differing(clean, clean)
    assert results.differing(clean, view_of(packaged, "a lamp")) == [2]


# -- sweeps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("metric", METRICS)
def test_one_cell_is_what_the_sweep_says(views, metric, direction):
    asked = ask(*views, metric=metric, direction=direction, kinds=("z", "mlp_out"))
    found = swept(*views, asked)
    one = results.patch(*views, asked, Cell("z", 4, 9, 1))
    ends = (found.base, found.values["z"][..., 4, 9, 1], found.source)
    assert one.values == pytest.approx([float(end[0, 0]) for end in ends], abs=1e-4)


@pytest.mark.parametrize("kind", results.KINDS)
def test_every_node_can_be_patched_by_itself(views, kind):
    view, other = views
    asked = ask(view, other, kinds=(kind,), positions=(7, 10))  # where the prompts agree nothing changes
    found = swept(view, other, asked)
    assert found.complete and list(found.values) == [asked.node(kind).name]
    cell = maps.top_cells(found, asked)[0][0]
    array = found.values[asked.node(kind).name].sel(layer=cell.layer, position=cell.position)[0, 0]
    swept_value = float(array[cell.unit] if array.ndim else array)
    assert cell.kind == kind and cell.position >= results.differing(view, other)[0]
    assert results.patch(view, other, asked, cell).values[1] == pytest.approx(swept_value, abs=1e-3)


@pytest.mark.parametrize("kind", ["resid_pre", "mixer_out", "mlp_out"])
def test_a_patch_of_nothing_changes_nothing(views, kind):
    same = results.patch(*views, ask(*views, kinds=(kind,)), Cell(kind, 3, 2))  # where the prompts agree
    assert (same.patched == same.base).all() and not (same.source == same.base).all()


def test_chosen_layers_are_swept_where_they_have_the_node(views):
    asked = ask(*views, layers=(3, 5), kinds=("resid_pre", "z", "router_logits", "ssm_state"), positions=(7, 9))
    parts = dict((tuple(layers), kinds) for kinds, layers in results.parts_of(views[0].model, asked))
    assert parts == {(3, 4, 5): ["resid_pre"], (4,): ["z"], (3, 5): ["router_logits", "ssm_state"]}
    found = swept(*views, asked)
    assert found.complete and set(found.values) == {asked.node(kind).name for kind in asked.kinds}
    assert np.isfinite(found.values["resid_pre"].values[0, 0, 3:6]).all()
    with pytest.raises(InputError, match="layers 0 to 1 have no z; choose more layers"):
        results.parts_of(views[0].model, ask(*views, layers=(0, 1), kinds=("z",)))


def test_a_stopped_sweep_keeps_what_is_done(views):
    asked = ask(*views, layers=(3, 5), kinds=("resid_pre", "z"))
    found = swept(*views, asked, stop_at=0.1)
    assert not found.complete and np.isfinite(found.values["resid_pre"].values[0, 0, 3:6]).any()
    assert "z" not in found.values or np.isnan(found.values["z"].values[0, 0, 4]).any()
    assert "resid_pre" in {cell.kind for cell, *_ in maps.top_cells(found, asked)}


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_largest_cells_are_those_of_the_table(views, direction):
    kinds = ("resid_pre", "z", "mlp_out")
    asked = ask(*views, kinds=kinds, direction=direction, layers=(0, 4), positions=(5, 10))
    found = swept(*views, asked)
    top, table = maps.top_cells(found, asked, most=3), found.table()
    sizes = [abs(value - float(found.base[0, 0])) for _, _, value in top]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0
    table = table[(table.node != "resid_pre") | (table.layer > 0)]
    table = table.assign(size=(table.value - float(found.base[0, 0])).abs())
    for kind in kinds:
        best = table[table.node == kind].nlargest(3, "size")
        own = [(c.layer, c.position, c.unit, effect, value) for c, effect, value in top if c.kind == kind]
        assert own == list(best[["layer", "position", "unit", "effect", "value"]].itertuples(index=False, name=None))


def test_tokens_are_texts_or_numbers(packaged):
    assert results.token_of(packaged, "correct", "Positive") == packaged.to_single_token("Positive")
    with pytest.raises(InputError, match="correct='a book'"):
        results.token_of(packaged, "correct", "a book")
    bare = SimpleNamespace(tokenizer=None, config=SimpleNamespace(d_vocab=6))
    assert results.token_of(bare, "correct", " 5 ") == 5
    for text in ("6", "x", "-1"):
        with pytest.raises(InputError, match="give 0 to 5"):
            results.token_of(bare, "correct", text)


def test_runs_that_agree_are_compared_by_the_second(packaged):
    view, other = view_of(packaged, prompt_pairs.GIFT), view_of(packaged, prompt_pairs.GIFT.replace("Bob", "Clara"))
    correct, wrong = results.first_tokens(view, other)
    assert correct == packaged.to_single_token("Alice") and wrong != correct


@pytest.mark.parametrize(
    ("shown", "changes"),
    [
        (EFFECT, {}),
        (CHANGE, {"direction": "noise", "layers": (3, 5), "metric": results.MASS}),
        (VALUE, {"kinds": (results.WINDOWED, results.WITH_CONV, "z"), "positions": (7, 9), "metric": "KL divergence"}),
    ],
)
def test_the_program_computes_what_the_page_shows(views, shown, changes):
    view, other = views
    asked, cell = ask(view, other, **changes), Cell("z", 4, 9, 1)
    space: dict = {}
    exec(widgets.source(view, patching_code.code(view, other, asked, shown, cell)), space)
    wanted = maps.shown_of(swept(view, other, asked), shown)
    assert list(space["effects"]) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(space["effects"][name].values[0, 0], array.values, rtol=1e-3, atol=1e-4)
    shares = torch.tensor(results.patch(view, other, asked, cell).patched).softmax(-1)
    torch.testing.assert_close(space["probabilities"], shares, rtol=1e-4, atol=1e-6)


# -- maps ----------------------------------------------------------------------------------------------------------


def test_maps_of_heads_have_a_row_for_each_the_strongest_or_one(views):
    asked = ask(*views)
    found = maps.shown_of(swept(*views, asked), EFFECT)
    each, largest, one = (maps.map_of(found["z"], [4], heads) for heads in (maps.EACH, maps.LARGEST, 2))
    assert each.rows == ("4 H0", "4 H1", "4 H2", "4 H3") and largest.rows == ("4",) and one.rows == ("4 H2",)
    strongest = np.abs(each.values).argmax(0)
    np.testing.assert_array_equal(largest.units[0], strongest)
    np.testing.assert_array_equal(largest.values[0], np.take_along_axis(each.values, strongest[None], 0)[0])
    np.testing.assert_array_equal(one.values[0], each.values[2])
    cell = Cell("z", 4, 9, 2)
    assert maps.place_of(each, cell, asked) == (2, 9) and maps.place_of(largest, cell, asked) == (0, 9)
    assert maps.cells_of_map(each, "z", asked)[2][9] == ("z", 4, 9, 2)
    stream = maps.map_of(found["resid_pre"], range(8), maps.EACH)
    assert stream.rows == tuple("01234567") and maps.place_of(stream, Cell("resid_pre", 3, 5), asked) == (3, 5)


def test_strongest_keeps_the_sign_and_skips_what_is_unknown():
    values, which = figures.strongest(np.array([[0.1, -3, NAN], [NAN] * 3]))
    np.testing.assert_array_equal(values, [-3, NAN])
    assert which.tolist() == [1, 0]


def test_a_map_of_cells_is_titled_signed_and_clickable():
    values = np.array([[0.5, -0.25, NAN], [NAN, NAN, 1]])
    cells = [[("z", 4, p, u) for p in range(3)] for u in range(2)]
    fig = figures.cell_map("z", "rule", values, ["4 H0", "4 H1"], cells, ["<b>", "x", "y"], 7, chosen=(1, 2))
    heat, targets = fig.data
    assert (heat.zmin, heat.zmax) == (-1, 1) and heat.colorbar.title.text == "effect (share of 1)"
    assert [list(c) for c in targets.customdata] == [["z", 4, 0, 0], ["z", 4, 1, 0], ["z", 4, 2, 1]]
    assert list(targets.x) == [7, 8, 9] and "&lt;b&gt;" in targets.text[0]
    assert list(fig.layout.yaxis.ticktext) == ["4 H0", "4 H1"] and fig.layout.xaxis.range == (6.5, 9.5)
    (frame,) = fig.layout.shapes
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (8.5, 9.5, 0.5, 1.5)
    amounts = figures.cell_map("p", "", values, ["a", "b"], cells, ["x"] * 3, signed=False, limit=0.5).data[0]
    assert (amounts.zmin, amounts.zmax) == (0, 0.5)


def test_long_maps_are_pooled_and_a_click_means_the_strongest():
    length = 2 * figures.MAX_COLUMNS + 1
    values = np.zeros((1, length))
    values[0, [4, 5, 600 % length]] = 0.2, -0.9, 0.1
    cells = [[("mlp_out", 0, p, 0) for p in range(length)]]
    fig = figures.cell_map("m", "rule", values, ["0"], cells, ["t"] * length, 100, chosen=(0, 5))
    heat, targets = fig.data
    assert fig.layout.title.subtitle.text == "rule; each column the strongest of 3 positions"
    assert heat.z.shape == (1, 171) and heat.z[0, 1] == -0.9 and list(targets.customdata[1]) == ["mlp_out", 0, 5, 0]
    assert fig.layout.shapes[0].x0 <= 105 <= fig.layout.shapes[0].x1
    assert heat.x[1] == 104


def test_next_tokens_stand_side_by_side():
    runs = [("corrupted (before)", [0.1, 0.9]), ("patched", [0.5, 0.5]), ("clean", [0.8, 0.2])]
    fig = figures.next_tokens(["<a>", "b"], runs, "title", "values")
    assert [bar.name for bar in fig.data] == [name for name, _ in runs] and fig.layout.barmode == "group"
    assert fig.layout.xaxis.ticktext == ("&lt;a&gt;", "b") and len({bar.marker.color for bar in fig.data}) == 3


# -- kept as a run -------------------------------------------------------------------------------------------------


def test_the_study_takes_the_nodes_that_it_knows(views):
    asked = ask(*views, kinds=("resid_pre", results.WITH_CONV, "dt"), direction="noise")
    spec = saving.spec_of(*views, asked)
    assert (spec.components, spec.directions) == (("resid_pre", "dt"), ("noise",))
    assert (spec.clean, spec.corrupted) == tuple(view.prompt for view in views)
    assert (spec.answer, spec.wrong) == ("mud", "river")
    assert saving.command_of(spec).startswith("jambascope study run activation_patching --set components=resid_pre,dt")
    with pytest.raises(InputError, match="does not patch"):
        saving.spec_of(*views, ask(*views, kinds=(results.WINDOWED,)))


def test_a_prompt_with_the_sign_that_parts_prompts_is_refused(packaged, views):
    with pytest.raises(InputError, match=r"parts prompts by \|"):
        saving.spec_of(view_of(packaged, "a | book"), views[1], ask(*views))


# -- the page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PURE)
@pytest.mark.parametrize("prompt", ["5", "5 17 3"])
def test_no_kind_of_model_fails(run_page, kind, prompt):
    app = run_page(PURE[kind], "patching", prompt)
    assert not app.exception and app.title and not app.error
    assert [metric.label for metric in app.metric] == ["Clean run", "Corrupted run", "Difference"]
