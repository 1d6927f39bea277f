"""What the SSM state and Router pages show: figures, files that are uploaded, the code, and models lacking a part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.dashboards import widgets
from jambascope.dashboards.models import checkpoint_of
from jambascope.dashboards.results import router, ssm_state, what_if
from jambascope.dashboards.session import View
from jambascope.errors import InputError
from jambascope.hooks import routing, routing_dependence, routing_sets, ssm
from jambascope.studies.figures import predictions as prediction_figures
from jambascope.studies.figures import routing as route_figures
from jambascope.studies.figures import ssm as state_figures

RNG = np.random.default_rng(0)
TOKENS = ["<bos>", "the", "<b>x</b>", "was", "dull"]
PROMPT = "the plot was gripping . Alice gave the book to Bob ."
SIZES = dict(d_model=16, d_vocab=20, d_inner=32, d_state=4, d_mlp=8, n_heads=2, n_key_value_heads=1, d_head=8)
KINDS = {
    "mamba2": JambaConfig(
        mixers=("mamba2", "attention"),
        feed_forwards=("none", "moe"),
        num_experts=3,
        experts_per_token=2,
        mamba_d_head=8,
        **SIZES,
    ),  # fmt: skip
    "one expert": JambaConfig(mixers=("mamba", "attention"), feed_forwards=("moe",) * 2, num_experts=1, **SIZES),
    "one slot": JambaConfig(
        mixers=("mamba",), feed_forwards=("moe",), num_experts=3, experts_per_token=1, d_conv=1, **SIZES
    ),
}


@pytest.fixture(scope="module")
def view() -> View:
    model = HookedJamba.from_pretrained("jamba-micro")
    ids = tuple(model.to_tokens(PROMPT)[0].tolist())
    texts = tuple(model.to_str_tokens(PROMPT))
    return View(model, checkpoint_of("jamba-micro", None, None), PROMPT, ids, texts, "jamba-micro", "jamba-micro")


def executed(view: View, lines: str, prompt: bool = True) -> dict:
    """What the code that a page shows leaves behind."""
    found: dict = {}
    exec(widgets.source(view, lines, prompt), found)
    return found


# -- figures --------------------------------------------------------------------------------------------------


def targets(fig) -> list:
    return [trace for trace in fig.data if trace.name == "click targets"]


def test_every_cell_of_the_sizes_can_be_clicked_while_there_are_few():
    norms = {2: RNG.uniform(size=5), 4: RNG.uniform(size=5)}
    (target,) = targets(state_figures.layer_norms(norms, TOKENS, 4, 3))
    assert [list(c) for c in target.customdata] == [[layer, t] for layer in norms for t in range(5)]
    assert not any("<b>" in text for text in target.text)
    long = {2: RNG.uniform(size=5000)}
    assert not targets(state_figures.layer_norms(long, ["a"] * 5000, 2, 0))


@pytest.mark.parametrize("channels", [6, 1200])
def test_the_selected_channel_is_framed_where_it_stands_in_the_order(channels):
    order, states = RNG.permutation(channels), RNG.normal(size=(channels, 5, 3))
    chosen = int(order[channels // 2])
    for fig in (
        state_figures.half_lives(RNG.uniform(0.1, 900, (channels, 3)), order, [3], chosen),
        state_figures.state_matrices(states, order, TOKENS, 2, chosen),
    ):
        shown = state_figures.shown_channels(order).tolist()
        frames = [shape for shape in fig.layout.shapes if shape.type == "rect"]
        assert len(frames) == len(targets(fig)) > 0
        for frame, target in zip(frames, targets(fig), strict=True):
            assert frame.x0 + 0.5 == shown.index(chosen) if chosen in shown else 0 <= frame.x0 + 0.5 < len(shown)
            assert set(target.customdata) == set(shown)
            assert [shown[int(x)] for x in target.x] == list(target.customdata)


def test_a_channels_states_are_ordered_by_half_life():
    states, dt = RNG.normal(size=(5, 3)), RNG.uniform(size=5)
    fig = state_figures.channel_over_time(states, np.array([9.0, 1.0, np.inf]), dt, TOKENS, 7, 2, 3)
    assert [trace.name for trace in fig.data[:3]] == ["n 1: 1", "n 0: 9", "n 2: ∞"]
    np.testing.assert_array_equal(fig.data[2].y, states[:, 2])
    np.testing.assert_array_equal(fig.data[3].y, dt)
    wide = state_figures.channel_over_time(RNG.normal(size=(5, 40)), RNG.uniform(size=40), dt, TOKENS, 7, 2, 3)
    assert not any(trace.showlegend for trace in wide.data)


def test_what_survives_begins_where_it_was_written():
    fig = state_figures.group_lines(
        RNG.uniform(size=(2, 3)), [(1, 2), (3, 4)], TOKENS, title="", subtitle="", unit="share", position=2, start=2
    )
    assert list(fig.data[0].x) == [2, 3, 4]
    assert fig.data[0].customdata[0] == "2 &lt;b&gt;x&lt;/b&gt;"


def test_probabilities_before_and_after_stand_beside_each_other():
    fig = prediction_figures.compared(TOKENS[:3], np.array([0.5, 0.3, 0.1]), np.array([0.1, 0.2, 0.6]), "<b>", 4, 0.25)
    assert [trace.name for trace in fig.data] == ["before", "after"]
    assert fig.layout.yaxis.ticktext[2] == "&lt;b&gt;x&lt;/b&gt;" and "<b>" not in fig.layout.title.text
    assert "0.25 nats" in fig.layout.title.subtitle.text


@pytest.mark.parametrize("length", [1, 5, 300])
def test_divergence_stands_at_the_token_that_is_predicted(length):
    kl, words = RNG.uniform(size=length), [TOKENS[i % 5] for i in range(length)]
    before, after = RNG.uniform(size=(2, length - 1))
    fig = prediction_figures.change_over_prompt(words, before, after, kl, 2)
    assert list(fig.data[2].x) == list(range(1, length))
    np.testing.assert_array_equal(fig.data[2].y, kl[:-1])
    fig.to_json()


def test_load_is_drawn_with_the_balanced_line_and_chance():
    fig = route_figures.layer_load(np.array([0.5, 0.25, 0.25, 0]), 8, 1, (0.1, 0.4))
    assert fig.layout.shapes[0].y0 == pytest.approx(10) and fig.layout.shapes[0].y1 == pytest.approx(40)
    assert fig.layout.shapes[1].y0 == fig.layout.shapes[1].y1 == 25
    assert fig.data[0].text[0] == "expert 0<br>4 of 8 choices"


def test_white_of_coactivation_is_chance_and_differences_are_centred():
    share = np.array([[np.nan, 0.6, 0.1], [0.5, np.nan, 0.5], [0.1, 0.6, np.nan]])
    (heat,) = route_figures.coactivation(share, 0.5, 1).data
    assert heat.colorscale[1][0] * heat.zmax == pytest.approx(0.5)
    (heat,) = route_figures.coactivation(share, 0.5, 1, share - 0.2).data
    assert heat.zmin == -heat.zmax == pytest.approx(-0.2)
    for alone in (np.full((1, 1), np.nan), np.array([[np.nan, 1.0], [1.0, np.nan]])):
        route_figures.coactivation(alone, 1.0, 1).to_json()
        route_figures.coactivation(alone, 1.0, 1, alone).to_json()


def test_routes_that_stay_are_not_replaced():
    fig = route_figures.route_changes({1: np.ones(5), 3: np.array([1, 0.5, 1, 1, 0])}, TOKENS, 1)
    np.testing.assert_array_equal(fig.data[0].z, [[0] * 5, [0, 0.5, 0, 0, 1]])


# -- uploads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\x00a", "not UTF-8 text"), (b"PK\0\1", "zero bytes"), (b" \n", "is empty")],
)
def test_what_is_no_text_is_refused(content, message):
    with pytest.raises(InputError, match=message):
        router.Text.of("a.txt", content)


def test_a_file_is_known_by_its_content_and_has_no_path():
    text = router.Text.of("..\\..\\<b>a</b>.txt", b"\xef\xbb\xbfthe plot")
    assert text.words == "the plot" and "\\" not in text.name
    assert text.digest != router.Text.of("a.txt", b"the plot").digest
    assert router.Text.of("/etc/passwd", b"x").name == "passwd"


def collected(view: View, files: tuple, windows: int, stop_after: int | None = None) -> router.Read:
    said = []

    def report(share: float, text: str = "", value=None) -> bool:
        said.append(share)
        return stop_after is None or len(said) <= stop_after

    found = router.reader(view, files, windows)(report)
    assert said == sorted(said) and (stop_after is not None or said[-1] == 1)
    return found


def test_files_are_domains(view):
    files = (router.Text.of("a.txt", b"the plot was dull . " * 60), router.Text.of("b.txt", b"Alice flumph Bob"))
    found = collected(view, files, 2)
    assert found.names == ("a.txt", "b.txt") and found.domains.tolist() == [0, 0, 1]
    route = found.routes[3]
    assert len(route) == 2 * router.LENGTH + 4 and found.labels(3)[-4:].tolist() == [1] * 4
    assert found.unknown > 0
    spent = router.words(("key", 1), 1000, view, route)
    assert spent.least == int(route.token_ids.bincount().max())


def test_a_text_that_is_stopped_keeps_what_was_read(view):
    part, whole = collected(view, (), 2, stop_after=1), collected(view, (), 2)
    assert len(part.domains) == router.BATCH < len(whole.domains) == 16
    assert torch.equal(part.routes[1].indices, whole.routes[1].indices[: len(part.routes[1])])


# -- code -----------------------------------------------------------------------------------------------------


def test_the_code_of_memory_and_channels_computes_what_is_shown(view):
    memory = ssm_state.remember(view, 2)
    found = executed(view, ssm_state.memory_code(2, 4))
    np.testing.assert_allclose(found["group_norms"], memory.norms)
    np.testing.assert_allclose(found["retention"], ssm_state.retained(memory, 4))
    np.testing.assert_allclose(found["survival"], ssm_state.surviving(memory, 4))
    np.testing.assert_allclose(found["norms"][2], ssm_state.norms(view)[2])
    found = executed(view, ssm_state.channel_code(2, 4, 9))
    np.testing.assert_array_equal(found["channel"], memory.states[9])
    np.testing.assert_array_equal(found["order"], np.concatenate(memory.groups))


EDITS = [
    ssm_state.Edit((2,), 4, None, True, True, None),
    ssm_state.Edit((0, 1), 4, 7, False, False, 6),
    router.Edit("masked", (0, 3), (1, 3), None),
    router.Edit("forced", (5, 2), (3,), 4),
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_the_code_of_a_change_computes_what_is_shown(view, edit):
    page = ssm_state if isinstance(edit, ssm_state.Edit) else router
    found, shown = executed(view, page.what_if_code(edit, 8)), page.change(view, edit, 8)
    change: what_if.Change = shown.predictions if page is router else shown
    np.testing.assert_allclose(found["divergence"], change.divergence, atol=1e-9)
    np.testing.assert_allclose(found["surprisal_after"], change.after, atol=1e-5)
    assert [c.text for c in found["candidates"]] == [c.text for c in change.candidates]
    assert change.divergence.max() > 0
    if page is router:
        for layer, kept in shown.kept.items():
            np.testing.assert_array_equal(found["kept"][layer], kept)
        assert all((kept == 1).all() for layer, kept in shown.kept.items() if layer < edit.layers[0])
        assert shown.kept[edit.layers[0]].min() < 1


def test_the_code_of_the_prompts_routes(view):
    found = executed(view, router.prompt_code(3))
    assert torch.equal(found["weights"], routing.kept_weights(router.route(view)[3]))
    found = executed(view, router.text_code(3, 1, 0, 0, None))
    assert torch.equal(found["pairs"].counts, routing_sets.coactivation(router.route(view)[3]).counts)


def test_the_code_of_a_text(view, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("the plot was dull . " * 60)
    Path("b.txt").write_text("Alice gave the book to Bob")
    for names in ([], ["a.txt", "b.txt"]):
        read = collected(view, tuple(router.Text.of(n, Path(n).read_bytes()) for n in names), 2)
        found = executed(view, router.text_code(3, 2, 2, router.LENGTH, names), prompt=False)
        shown = router.domains((tuple(names), "code"), 3, read)
        torch.testing.assert_close(found["domains"].share, shown.share)
        spread = routing_dependence.vocabulary_specialization(read.routes[3], least=2)
        torch.testing.assert_close(found["words"].share, spread.share)


# -- pages ----------------------------------------------------------------------------------------------------


STATE_PARTS = ({"state_part": "channels"}, {"state_part": "what if"})
PINNED = {"state_edit": "pin to another position", "state_layers": "all Mamba layers", "channel_group": "8"}
ROUTER_PARTS = ({"router_part": "over a text"}, {"router_part": "what if", "expert_edit": "off, output zero"})


@pytest.mark.parametrize("prompt", ["5", "5 17 3"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("page", "state"),
    [("ssm_state", s) for s in (*STATE_PARTS, STATE_PARTS[1] | PINNED)] + [("router", s) for s in ROUTER_PARTS],
)
def test_no_part_fails_on_any_kind_of_model(run_page, kind, page, state, prompt):
    app = run_page(KINDS[kind], page, prompt, **state)
    assert not app.exception and app.expander


def test_a_route_needs_an_expert_for_each_slot(run_page):
    state = {"router_part": "what if", "expert_edit": "forced route", "experts_forced": [1]}
    app = run_page(KINDS["mamba2"], "router", "5 17", **state)
    assert "a route has 2 experts; choose as many" in app.exception[0].message


def test_half_lives_and_survival_agree(view):
    """What is written has halved after its half-life, where the step size is the prompt's mean."""
    memory = ssm_state.remember(view, 2)
    steady = torch.from_numpy(memory.dt).mean(0).expand(40, -1)
    left = ssm.survival(torch.from_numpy(memory.A), steady, 0)
    half = torch.from_numpy(memory.half_lives)
    whole = (half > 1) & (half < 39)
    after = left.log2().abs()[1:] / torch.arange(1, 40)[:, None, None]
    torch.testing.assert_close((1 / after)[0][whole], half[whole], rtol=1e-3, atol=1e-3)
