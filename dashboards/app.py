"""The dashboard's frame: navigation, model, prompt. Start it with ``jambascope dashboard DIR``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import streamlit as st
from streamlit.errors import StreamlitAPIException

from jambascope.dashboards import session, widgets
from jambascope.dashboards.pages import attention, formats, induction, overview, patching, router, runs, ssm_state
from jambascope.errors import JambascopeError

# Text of figures takes the page's own colour, in either theme: Streamlit's grey for axes is too faint on white.
STYLE = """<style>
.js-plotly-plot .infolayer text, .js-plotly-plot :is(.xtick, .ytick) text {
    fill: currentColor !important; fill-opacity: 0.82;
}
.js-plotly-plot .infolayer .gtitle {fill-opacity: 1;}
[data-testid="stMainBlockContainer"] {padding-top: 2.6rem; padding-bottom: 3rem; max-width: 1500px;}
[data-testid="stSidebarHeader"] {padding-bottom: 0; height: 2.5rem;}
[data-testid="stMetricValue"] {font-size: 1.25rem;}
</style>"""

PAGES = (
    (overview, "Overview", "account_tree", "", True),
    (attention, "Attention", "grid_on", "attention", True),
    (ssm_state, "SSM state", "memory", "ssm_state", True),
    (router, "Router", "alt_route", "router", True),
    (induction, "Induction", "repeat", "induction", True),
    (formats, "Format following", "format_list_bulleted", "formats", False),
    (patching, "Patching", "healing", "patching", True),
    (runs, "Runs", "folder_open", "runs", False),
)
"""Module, title, icon, address (that of the first is "/"), and whether the page is about the prompt in the sidebar."""


def sidebar() -> tuple[str, str]:
    """The model and the prompt, both kept in the URL."""
    with st.sidebar:
        choices = session.model_choices()
        name = st.selectbox(
            "Model", choices, key="model", bind="query-params", on_change=_fit_prompt, help=session.start().model
        )
        model, _ = session.open_checkpoint(name)
        examples = session.examples(model)
        prompt = st.text_area(
            "Prompt",
            examples[0],
            key="prompt",
            bind="query-params",
            height=190,
            placeholder="type text" if model.tokenizer is not None else "type token ids",
            help="Everything on the pages comes from one forward pass of this prompt. Ctrl+Enter runs it.",
        )
        st.selectbox(
            "Example prompts",
            examples,
            index=None,
            key="example",
            on_change=_use_example,
            placeholder="take an example",
        )
        if model.tokenizer is None:
            highest = model.config.d_vocab - 1
            st.caption(f"This checkpoint has no tokenizer: a prompt is token ids from 0 to {highest}, such as 5 17 3.")
        widgets.choose_image()
    return name, prompt


def _use_example() -> None:
    if st.session_state.example:
        st.session_state.prompt = st.session_state.example


def _fit_prompt() -> None:
    """Another model: an untouched example of the last one becomes one that the new model can read."""
    known = {*session.TEXT_EXAMPLES, *session.ID_EXAMPLES}
    if st.session_state.get("prompt", "") in known | {""}:
        try:
            model, _ = session.open_checkpoint(st.session_state.model)
        except JambascopeError:
            return  # the page itself will say so
        st.session_state.prompt = session.examples(model)[0]
    st.session_state.example = None


def on_page(address: str, render: Callable[..., None], of_prompt: bool) -> Callable[[], None]:
    """A page for st.navigation; its errors are one line.

    Args:
        address: tells it from the others.
        render: the page, given a view that is made when it runs; nothing where it is not ``of_prompt``.
    """

    def run() -> None:
        _keep_link(address)
        try:
            name, prompt = sidebar()
            if not of_prompt:
                render()
                return
            view = session.view(name, prompt)
            with st.container():  # always there, so that what follows keeps its place when a note comes or goes
                _note_unknown_words(view)
            render(view)
        except JambascopeError as problem:
            widgets.error(problem)

    return run


def _keep_link(address: str) -> None:
    """Whoever opens a link and turns the page finds there what the link has set.

    Streamlit takes the values of widgets to the next page, but only those that it has seen in two runs; the first run
    on a page that is opened by a link is often the only one.
    """
    state = st.session_state
    opened = "address" not in state
    turned = state.get("address") != address
    state.address, link = address, state.pop("link", None)
    if opened:
        state.link = {key: st.query_params.get_all(key) for key in st.query_params}
    elif link and turned:
        try:
            st.query_params.from_dict(link)
        except StreamlitAPIException:  # a widget of the last page still holds a key, whose value is then its default
            for key, values in link.items():
                with suppress(StreamlitAPIException):
                    st.query_params[key] = values
        del state.address  # the page opens with them
        st.rerun()


def _note_unknown_words(view: session.View) -> None:
    unknown = session.unknown_positions(view)
    if not unknown:
        return
    words = "1 word is" if len(unknown) == 1 else f"{len(unknown)} words are"
    where = ", ".join(map(str, unknown[:8])) + (", …" if len(unknown) > 8 else "")
    st.warning(
        f"{words} not in this model's vocabulary and reached it as &lt;unk&gt; (position {where}). "
        "The vocabulary is listed on the Overview page.",
        icon=":material/help:",
    )


def main() -> None:
    st.set_page_config(page_title="jambascope", page_icon=":material/biotech:", layout="wide")
    st.html(STYLE)
    pages = [
        st.Page(
            on_page(path, module.page, of_prompt),
            title=title,
            icon=f":material/{icon}:",
            url_path=path or None,
            default=not path,
        )
        for module, title, icon, path, of_prompt in PAGES
    ]
    # The first page's own address is "/"; somebody who types its name, as with the others, gets it too.
    pages.append(
        st.Page(on_page("overview", overview.page, True), title="Overview", url_path="overview", visibility="hidden")
    )
    st.navigation(pages).run()


main()
