"""The cache's decompositions against the modules' own outputs, TransformerLens's on pure attention, and naive sums."""

from __future__ import annotations

import functools

import pytest
import torch
import transformer_lens
from transformer_lens.utilities import Slice

from jambascope import HookedJamba
from jambascope.activation_cache import ActivationCache
from jambascope.errors import HookError, InputError


def tokens(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(0, 29, (batch, length), generator=torch.Generator().manual_seed(3))


def module_outputs(model: HookedJamba, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What torch's own hooks see leave each module."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if name.count(".") <= 2 and name.split(".")[-1] in ("embed", "attn", "mixer", "mlp", "ln_final"):
            keep = functools.partial(lambda key, m, i, o: seen.__setitem__(key, o.detach()), name)
            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        seen["logits"] = model(ids)
    [handle.remove() for handle in handles]
    return seen


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> None:
    assert a.shape == b.shape, (a.shape, b.shape)
    scale = b.abs().max().clamp_min(1e-30) if b.numel() else torch.tensor(1.0)
    error = ((a - b).abs().max() / scale).item() if b.numel() else 0.0
    assert error < tolerance, error


@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (1, 5)], ids=str)
def test_components_are_what_the_modules_added_and_sum_to_the_stream(shape, any_model):
    ids = tokens(*shape)
    seen = module_outputs(any_model, ids)
    _, cache = any_model.run_with_cache(ids)
    assert type(cache) is ActivationCache and isinstance(cache, transformer_lens.ActivationCache)
    total, labels, at = seen["embed"], ["embed"], {0: seen["embed"]}
    mids = {}
    for i, (mixer, feed_forward) in enumerate(
        zip(any_model.config.mixers, any_model.config.feed_forwards, strict=True)
    ):
        which = "attn" if mixer == "attention" else "mixer"
        total = total + seen[f"blocks.{i}.{which}"]
        labels.append(f"{i}_{which}_out")
        mids[i] = total
        if feed_forward != "none":
            total = total + seen[f"blocks.{i}.mlp"]
            labels.append(f"{i}_mlp_out")
        at[i + 1] = total
    stack, got = cache.decompose_resid(return_labels=True)
    assert got == labels
    for label, value in zip(got, stack, strict=True):
        name = "embed" if label == "embed" else "blocks.{}.{}".format(*label.removesuffix("_out").split("_"))
        close(value, seen[name])
    for layer, stream in at.items():
        close(cache.decompose_resid(layer).sum(0), stream)
        for options in ({}, dict(expand_neurons=False), dict(expand_experts="experts"), dict(expand_experts="slots")):
            close(cache.get_full_resid_decomposition(layer, **options).sum(0), stream)
        for method in (cache.stack_head_results, cache.stack_neuron_results):
            close(method(layer, incl_remainder=True).sum(0), stream)
        for experts in ("experts", "slots"):
            close(cache.decompose_resid(layer, expand_experts=experts).sum(0), stream)
        if layer < any_model.config.n_layers and any_model.config.feed_forwards[layer] != "none":
            close(cache.decompose_resid(layer, mlp_input=True).sum(0), mids[layer])
            close(cache.get_full_resid_decomposition(layer, mlp_input=True).sum(0), mids[layer])
            close(cache.stack_neuron_results(layer, mlp_input=True, incl_remainder=True).sum(0), mids[layer])
    close(cache.accumulated_resid(), torch.stack(list(at.values())))
    _, names = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert [n for n in names if n.endswith("mid")] == [
        f"{i}_mid" for i, f in enumerate(any_model.config.feed_forwards) if f != "none"
    ]


def test_logit_attributions_sum_to_the_logits(any_model):
    ids = tokens()
    seen = module_outputs(any_model, ids)
    _, cache = any_model.run_with_cache(ids)
    stack = cache.get_full_resid_decomposition(expand_experts="experts")
    close(cache.logit_attrs(stack, 5).sum(0), seen["logits"][..., 5])
    wanted = seen["logits"][..., 5] - seen["logits"][..., 7]
    close(cache.logit_attrs(stack, 5, 7).sum(0), wanted)
    target = torch.tensor([4, 9])
    close(cache.logit_attrs(stack, target).sum(0), seen["logits"][[0, 1], :, target])
    last = cache.get_full_resid_decomposition(pos_slice=-1)
    close(cache.logit_attrs(last, 5, pos_slice=-1).sum(0), seen["logits"][:, -1, 5])
    one = cache.logit_attrs(last, 5, pos_slice=-1, batch_slice=1)
    close(one.sum(0), seen["logits"][1, -1, 5])
    direction = any_model.tokens_to_residual_directions(5)
    for onto in (direction, torch.stack((direction, -direction), -1)):
        folded = cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=onto)
        close(folded.sum(0), seen["logits"][..., 5] if onto.ndim == 1 else
              torch.stack((seen["logits"][..., 5], -seen["logits"][..., 5]), -1))  # fmt: skip
    close(cache.accumulated_resid(apply_ln=True)[-1], seen["ln_final"])
    close(cache.decompose_resid(apply_ln=True).sum(0), seen["ln_final"])


@pytest.mark.parametrize("pos_slice", [None, 3, -1, (2, 5), [0, 4]], ids=str)
def test_positions_and_a_missing_batch_axis(pos_slice, any_model):
    ids = tokens(1)
    _, cache = any_model.run_with_cache(ids)
    _, alone = any_model.run_with_cache(ids, remove_batch_dim=True)
    everywhere = cache.get_full_resid_decomposition(expand_experts="experts")
    whole = cache.stack_head_results(), cache.decompose_resid(), cache.accumulated_resid(), everywhere
    chosen = [Slice(pos_slice).apply(stack, dim=-2) for stack in whole]

    def results(c):
        return (
            c.stack_head_results(pos_slice=pos_slice),
            c.decompose_resid(pos_slice=pos_slice),
            c.accumulated_resid(pos_slice=pos_slice),
            c.get_full_resid_decomposition(pos_slice=pos_slice, expand_experts="experts"),
        )

    for got, bare, expected in zip(results(cache), results(alone), chosen, strict=True):
        close(got, expected)
        close(bare, expected[:, 0])
    normalised = cache.decompose_resid(apply_ln=True, pos_slice=pos_slice)
    close(normalised, Slice(pos_slice).apply(cache.decompose_resid(apply_ln=True), dim=-2))
    assert cache.remove_batch_dim() is cache and not cache.has_batch_dim
    for got, expected in zip(results(cache), chosen, strict=True):
        close(got, expected[:, 0])


def test_experts_are_the_same_captured_and_computed(model_of_kind):
    model, ids = model_of_kind("hybrid"), tokens()
    name = "blocks.1.mlp.hook_expert_out"
    _, computed = model.run_with_cache(ids)
    _, captured = model.run_with_cache(ids, names_filter=lambda n: True)
    addends = captured[name]
    close(computed.get_expert_results(1), addends)
    assert name not in computed and torch.equal(captured.get_expert_results(1), addends)
    stack, labels = captured.decompose_resid(expand_experts="experts", return_labels=True)
    indices = captured["blocks.1.mlp.router.hook_expert_indices"]
    for x in range(3):
        expected = torch.zeros_like(stack[0])
        for b, t, s in torch.cartesian_prod(*(torch.arange(n) for n in indices.shape)).tolist():
            if indices[b, t, s] == x:
                expected[b, t] += addends[b, t, s]
        close(stack[labels.index(f"L1E{x}")], expected)
    _, labels = captured.decompose_resid(expand_experts="slots", return_labels=True)
    assert labels[4:7] == ["L1S0", "L1S1", "2_mixer_out"]
    with pytest.raises(HookError, match=r"layer 0 has no experts; the MoE layers are \[1, 3\]"):
        computed.get_expert_results(0)


def test_heads_and_neurons_by_a_loop(model_of_kind):
    model, ids = model_of_kind("hybrid"), tokens()
    _, cache = model.run_with_cache(ids)
    z, o = cache["z", 1], model.blocks[1].attn.o_proj.weight
    heads, labels = cache.stack_head_results(return_labels=True)
    assert labels == ["L1H0", "L1H1", "L1H2", "L1H3"]
    for h in range(4):
        close(heads[h], z[:, :, h] @ o[:, 4 * h : 4 * h + 4].T)
    assert cache.stack_head_results(1).shape == (0, 2, 7, 16)
    assert cache.stack_head_results(0).shape == (0, 2, 7, 16)
    cache.compute_head_results()
    close(cache["result", 1].movedim(-2, 0), heads)
    assert torch.equal(cache.stack_head_results(), cache["result", 1].movedim(-2, 0))
    neurons, labels = cache.stack_neuron_results(4, neuron_slice=[1, 5], return_labels=True)
    assert labels == ["L0N1", "L0N5"]
    post, down = cache["post", 0], model.blocks[0].mlp.down_proj.weight
    close(neurons[1], post[..., 5:6] * down[:, 5])
    close(cache.stack_neuron_results(4, neuron_slice=5), neurons[1:])
    close(cache.get_neuron_results(0, 5), neurons[1])
    onto = torch.randn(16, 3, dtype=torch.float64)
    close(cache.stack_neuron_results(2, project_output_onto=onto, apply_ln=True),
          cache.stack_neuron_results(2, apply_ln=True) @ onto)  # fmt: skip
    with pytest.raises(HookError, match=r"layer 1 has no dense feed-forward, so no neurons; .* \[0\]"):
        cache.get_neuron_results(1)


@pytest.mark.parametrize("apply_ln", [False, True])
def test_on_pure_attention_all_is_as_transformer_lens_has_it(apply_ln, model_of_kind):
    model = model_of_kind("attention")
    for name, parameter in model.named_parameters():
        if "ln" in name:
            parameter.data.fill_(1.0)  # TransformerLens takes the weights to be folded away
    model.accumulated_bias = lambda *a, **k: torch.zeros(16, dtype=torch.float64)
    _, ours = model.run_with_cache(tokens())
    theirs = transformer_lens.ActivationCache(dict(ours.cache_dict), model)
    calls = [
        ("decompose_resid", dict(layer=1)),
        ("decompose_resid", dict(mode="mlp", pos_slice=2)),
        ("decompose_resid", dict(layer=1, mlp_input=True, mode="attn", incl_embeds=False)),
        ("accumulated_resid", dict(incl_mid=True)),
        ("accumulated_resid", dict(layer=1, mlp_input=True, pos_slice=(1, 4))),
        ("stack_head_results", dict(incl_remainder=True)),
        ("stack_head_results", dict(layer=1, pos_slice=-1)),
        ("stack_neuron_results", dict(layer=2, incl_remainder=True)),
        ("stack_neuron_results", dict(layer=1, neuron_slice=(3, 6), mlp_input=True, incl_remainder=True)),
        ("stack_neuron_results", dict(layer=2, project_output_onto=torch.randn(16, dtype=torch.float64))),
        ("get_full_resid_decomposition", dict(layer=1, mlp_input=True)),
        ("get_full_resid_decomposition", dict(expand_neurons=False)),
        ("get_full_resid_decomposition", dict(project_output_onto=torch.randn(16, 2, dtype=torch.float64))),
    ]
    for method, arguments in calls:
        arguments = arguments | dict(return_labels=True, apply_ln=apply_ln)
        expected, names = getattr(theirs, method)(**arguments)
        got, labels = getattr(ours, method)(**arguments)
        if names[-1] == "bias":
            expected, names = expected[:-1], names[:-1]
        assert labels == [str(name).replace("tensor(", "").replace(")", "") for name in names], (method, arguments)
        close(got, expected)
    stack = ours.decompose_resid()
    close(ours.logit_attrs(stack, 3, 4), theirs.logit_attrs(stack, 3, 4))
    for name in ("pattern", "mlp_out", "resid_pre"):
        close(ours.stack_activation(name), theirs.stack_activation(name))


def test_stacked_activations_are_of_the_layers_that_have_them(model_of_kind):
    model = model_of_kind("hybrid")
    _, cache = model.run_with_cache(tokens())
    assert cache.layers_with("mixer_out") == [0, 2, 3] and cache.layers_with("pattern") == [1]
    assert cache.layers_with("expert_weights") == [1, 3] and cache.layers_with("scale", "ln2") == [0, 1, 3]
    assert cache.stack_activation("mixer_out").shape[0] == 3 and cache.stack_activation("mixer_out", 2).shape[0] == 1
    assert torch.equal(cache.stack_activation("dt", sublayer_type="mixer")[1], cache["blocks.2.mixer.hook_dt"])
    assert cache.stack_activation("z").shape == (1, 2, 7, 4, 4)
    assert cache.stack_activation("z", sublayer_type="mixer").shape == (3, 2, 7, 32)
    assert cache.stack_activation("normalized", sublayer_type="ln2").shape[0] == 3
    with pytest.raises(HookError, match="no layer below 1 of this model has 'pattern'"):
        cache.stack_activation("pattern", 1)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (("pattern", 1), "blocks.1.attn.hook_pattern"),
        (("pattern", 1, "attn"), "blocks.1.attn.hook_pattern"),
        (("resid_post", -1), "blocks.3.hook_resid_post"),
        ("pattern1", "blocks.1.attn.hook_pattern"),
        ("embed", "hook_embed"),
        ("scale", "ln_final.hook_scale"),
        (("scale", 0, "ln2"), "blocks.0.ln2.hook_scale"),
        (("dt", 2), "blocks.2.mixer.hook_dt"),
        (("z", 2, "mixer"), "blocks.2.mixer.hook_z"),
        (("out", 1, "router"), "blocks.1.mlp.router.hook_out"),
        (("z", 1), "blocks.1.attn.hook_z"),
        (("expert_weights", 1), "blocks.1.mlp.router.hook_expert_weights"),
        ("blocks.1.mlp.hook_expert_weights", "blocks.1.mlp.router.hook_expert_weights"),
    ],
    ids=str,
)
def test_keys(key, name, model_of_kind):
    _, cache = model_of_kind("hybrid").run_with_cache(tokens())
    assert cache[key] is cache.cache_dict[name]


def test_what_was_not_kept_is_named(model_of_kind):
    model = model_of_kind("hybrid")
    _, cache = model.run_with_cache(tokens(), names_filter=["hook_embed", "blocks.0.hook_mixer_out"])
    with pytest.raises(HookError, match=r"does not hold blocks\.0\.hook_mlp_out; name what to keep"):
        cache.decompose_resid()
    with pytest.raises(HookError, match=r"does not hold blocks\.0\.hook_resid_pre, .* and 1 more"):
        cache.accumulated_resid()
    with pytest.raises(HookError, match=r"blocks\.1\.attn\.hook_z"):
        cache.stack_head_results()
    with pytest.raises(HookError, match=r"ln2\.hook_normalized.*; or keep blocks\.1\.mlp\.hook_expert_out"):
        cache.get_expert_results(1)
    with pytest.raises(HookError, match="no hook point 'blocks.0.attn.hook_pattern'"):
        cache["pattern", 0]
    with pytest.raises(HookError, match="ln_final.hook_scale"):
        cache.apply_ln_to_stack(cache["hook_embed"][None])
    with pytest.raises(InputError, match="layer=9 must lie in 0..4"):
        cache.decompose_resid(9)
    with pytest.raises(InputError, match="layer 2 has no feed-forward"):
        cache.decompose_resid(2, mlp_input=True)
    with pytest.raises(InputError, match="batch of 2"):
        cache.remove_batch_dim()
    row = cache.apply_slice_to_batch_dim(1)
    assert type(row) is ActivationCache and torch.equal(row["embed"], cache["embed"][1])


@pytest.mark.parametrize("kind", ["hybrid", "mamba2"])
def test_what_is_kept_does_not_change_when_a_later_hook_edits_in_place(kind, model_of_kind):
    """At every point in turn: what the cache holds of it and of all that came before is what a plain run has."""
    model, ids = model_of_kind(kind), tokens()
    order = []
    everything = [name for name in model.hook_rows]
    with torch.no_grad(), model.hooks([(n, lambda v, hook: order.append(hook.name)) for n in everything]):
        model(ids)
    _, plain = model.run_with_cache(ids, names_filter=everything)
    plain = {name: value.clone() for name, value in plain.items()}

    def spoil(value, hook):
        value.zero_()

    for point in everything:
        cache, keep, _ = model.get_caching_hooks(lambda name: True)
        with torch.no_grad(), model.hooks([*keep, (point, spoil)]):
            model(ids)
        for name in order[: order.index(point) + 1]:
            close(cache[name].nan_to_num(neginf=-1), plain[name].nan_to_num(neginf=-1), 1e-9)


def test_nothing_is_copied_when_nobody_else_listens(model_of_kind):
    model, ids = model_of_kind("hybrid"), tokens()
    seen = {}
    model.blocks[0].hook_resid_post.register_forward_hook(lambda m, i, o: seen.update(post=o))
    try:
        _, cache = model.run_with_cache(ids)
    finally:
        model.blocks[0].hook_resid_post._forward_hooks.clear()
    assert cache["blocks.0.hook_resid_post"].data_ptr() != seen["post"].data_ptr()  # another hook: copied
    assert cache["blocks.0.hook_resid_post"].data_ptr() != cache["blocks.1.hook_resid_pre"].data_ptr()
    _, cache = model.run_with_cache(ids)
    assert cache["blocks.0.hook_resid_post"].data_ptr() == cache["blocks.1.hook_resid_pre"].data_ptr()


@pytest.mark.parametrize("pos_slice", [-1, (2, 4), [1, 5]], ids=str)
def test_of_a_slice_no_more_than_the_slice_is_kept(pos_slice, model_of_kind):
    names = ["hook_embed", "blocks.0.mixer.hook_ssm_state", "blocks.1.attn.hook_pattern"]
    _, cache = model_of_kind("hybrid").run_with_cache(tokens(), names_filter=names, pos_slice=pos_slice)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in cache.values())


def test_transformer_lens_readouts_run_on_it(any_model):
    from transformer_lens.tools.analysis import direct_logit_attribution, logit_lens

    ids = tokens()
    logits = any_model(ids)
    lens = logit_lens(any_model, ids, positions=None)
    close(lens.values[-1], logits.detach())
    for unit in ("component", "head"):
        total = direct_logit_attribution(any_model, ids, 5, 6, unit=unit).attribution.sum(0)
        close(total.detach(), (logits[:, -1, 5] - logits[:, -1, 6]).detach())


def test_states_are_those_that_were_kept(model_of_kind):
    model, ids = model_of_kind("hybrid"), tokens()
    _, cache = model.run_with_cache(ids, names_filter=lambda name: "ssm_state" in name)
    assert cache.ssm_layers() == [0, 2, 3]
    states = cache.compute_ssm_state()
    assert list(states) == [0, 2, 3] and torch.equal(states[2], cache["blocks.2.mixer.hook_ssm_state"])
    assert torch.equal(cache.compute_ssm_state(2, -1), states[2][:, :, -1])
    with pytest.raises(HookError, match="blocks.1.mixer.hook_ssm_state"):
        cache.compute_ssm_state(1)
    _, cache = model.run_with_cache(ids)
    with pytest.raises(HookError, match="does not hold blocks.0.mixer.hook_ssm_state"):
        cache.compute_ssm_state(0)
    with pytest.raises(HookError, match="jambascope.hooks.hidden_attention"):
        cache.compute_ssm_effective_attention(0)
