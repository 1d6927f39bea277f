"""Opening and saving checkpoint directories, and what is said about damaged ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from jambascope import HookedJamba, JambaConfig, checkpoint
from jambascope.errors import CheckpointError, ConfigError
from jambascope.hf_format import config_from_hf, config_to_hf
from jambascope.model import initialize

JAMBA = dict(
    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, num_experts=4, attn_layer_period=3, attn_layer_offset=1, initializer_range=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def hf_model():
    torch.manual_seed(0)
    return transformers.JambaForCausalLM(transformers.JambaConfig(**JAMBA)).eval()


@pytest.fixture
def directory(hf_model, tmp_path):
    hf_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def ids():
    return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def agree(ours, theirs, ids, tolerance=1e-5):
    torch.testing.assert_close(ours(ids), theirs(ids, use_cache=False).logits, rtol=tolerance, atol=tolerance)


def rewrite(directory, change):
    """Apply ``change`` to the tensors of a single-file checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def fuse_experts(tensors):
    for layer in (1, 3):
        prefix = f"model.layers.{layer}.feed_forward.experts."
        parts = {
            k: torch.stack([tensors.pop(f"{prefix}{e}.{k}_proj.weight") for e in range(4)])
            for k in ("gate", "up", "down")
        }
        tensors[prefix + "gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), dim=1)
        tensors[prefix + "down_proj"] = parts["down"]


# -- what opens ----------------------------------------------------------------------------------------------


def test_experts_one_by_one_and_fused(directory, hf_model, ids):
    agree(HookedJamba.from_pretrained(directory), hf_model, ids)
    rewrite(directory, fuse_experts)
    agree(HookedJamba.from_pretrained(directory), hf_model, ids)


def test_shards_with_an_index(hf_model, tmp_path, ids):
    hf_model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    agree(HookedJamba.from_pretrained(tmp_path), hf_model, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stored_types(dtype, hf_model, tmp_path, ids):
    theirs = transformers.JambaForCausalLM(hf_model.config)
    theirs.load_state_dict(hf_model.state_dict())
    theirs.to(dtype).save_pretrained(tmp_path)
    assert HookedJamba.from_pretrained(tmp_path).dtype == dtype
    widened = HookedJamba.from_pretrained(tmp_path, dtype=torch.float32)
    assert widened.dtype == torch.float32
    agree(widened, theirs.float().eval(), ids)


@pytest.mark.parametrize(
    "fields",
    [
        dict(num_experts=1),
        dict(tie_word_embeddings=True),
        dict(num_hidden_layers=1),
        dict(attn_layer_period=1, attn_layer_offset=0),
        dict(attn_layer_period=9, attn_layer_offset=8, mamba_proj_bias=True),
        dict(expert_layer_period=1, expert_layer_offset=0, num_experts_per_tok=1),
    ],
    ids=str,
)
def test_jamba_there_and_back(fields, tmp_path, ids):
    theirs = transformers.JambaForCausalLM(transformers.JambaConfig(**JAMBA | fields)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = HookedJamba.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(back(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits)
    assert set(load_file(tmp_path / "ours/model.safetensors")) == set(load_file(tmp_path / "theirs/model.safetensors"))


@pytest.mark.parametrize("fields", [{}, dict(use_bias=True, tie_word_embeddings=False, state_size=3)], ids=str)
def test_mamba_there_and_back(fields, tmp_path, ids):
    config = transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, **fields)
    theirs = transformers.MambaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = HookedJamba.from_pretrained(tmp_path / "theirs")
    assert ours.config.feed_forwards == ("none", "none")
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(back(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    "fields",
    [
        dict(rotary=True),
        dict(inner_norms=False),
        dict(mixers=("mamba", "mamba", "attention", "attention")),
        dict(feed_forwards=("none", "moe", "dense", "moe")),
        dict(num_experts=1, experts_per_token=1),
    ],
    ids=lambda f: next(iter(f)),
)
def test_models_that_only_we_can_describe(fields, small_config, tmp_path, tokens):
    config = JambaConfig(**small_config.to_dict() | fields)
    model = HookedJamba(config)
    initialize(model, std=0.2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "jambascope"
    again = HookedJamba.from_pretrained(tmp_path)
    assert again.config == config
    assert torch.equal(again(tokens), model(tokens))


def test_the_tokenizer_travels_and_ids_do_without(directory, tmp_path):
    without = HookedJamba.from_pretrained(directory)
    assert without.tokenizer is None
    assert without.to_tokens("5 17 3").tolist() == [[5, 17, 3]]
    assert without.to_str_tokens("5 17") == ["5", "17"] and without.to_string(torch.tensor([5, 17])) == "5 17"

    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", "red", "blue"])}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(directory)
    model = HookedJamba.from_pretrained(directory)
    model.save_pretrained(tmp_path / "copy")
    for opened in (model, HookedJamba.from_pretrained(tmp_path / "copy")):
        assert opened.to_tokens("red blue").tolist() == [[1, 2, 3]]  # bos_token_id of the config in front
        assert opened.to_tokens("red blue", prepend_bos=False).tolist() == [[2, 3]]
        assert opened.to_str_tokens("red blue") == ["<s>", "red", "blue"]
        assert opened.to_single_token("blue") == 3
        assert opened.to_tokens(["red", "red blue red"]).shape == (2, 4)


def test_saving_again_over_shards_leaves_no_stale_index(hf_model, tmp_path, ids):
    hf_model.save_pretrained(tmp_path, max_shard_size="40KB")
    HookedJamba.from_pretrained(tmp_path).save_pretrained(tmp_path)
    agree(HookedJamba.from_pretrained(tmp_path), hf_model, ids)
    assert not list(tmp_path.glob("*.tmp"))


def test_shards_saved_over_a_single_file_replace_it(small_model, small_config, tmp_path, monkeypatch, tokens):
    HookedJamba(small_config).save_pretrained(tmp_path)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    small_model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    agree(HookedJamba.from_pretrained(tmp_path), back, tokens)
    assert torch.equal(HookedJamba.from_pretrained(tmp_path)(tokens), small_model(tokens))


def test_a_block_of_eight_is_written_with_the_published_periods():
    config = JambaConfig.jamba(n_layers=8, d_model=16, d_vocab=9, d_mlp=8, num_experts=4)
    written = config_to_hf(config, torch.float32)
    assert (written["attn_layer_period"], written["attn_layer_offset"]) == (8, 4)
    assert (written["expert_layer_period"], written["expert_layer_offset"]) == (2, 1)


def test_others_may_read_what_is_saved(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "weights must be as readable as the configuration beside them"


@pytest.mark.parametrize("family", ["jamba", "mamba", "mamba2"])
def test_every_field_survives_saving(family, small_config, tmp_path):
    fields = dict(n_ctx=99, activation_coef=1e-5, load_balancing_coef=0.02)
    if family != "jamba":
        fields = dict(n_ctx=99, activation_coef=1e-5, mixers=(family,) * 4, feed_forwards=("none",) * 4)
        fields |= dict(inner_norms=False) if family == "mamba" else dict(mamba_d_head=8, chunk_size=16)
    config = JambaConfig(**small_config.to_dict() | fields)
    HookedJamba(config).save_pretrained(tmp_path)
    again = HookedJamba.from_pretrained(tmp_path).config
    assert all(getattr(again, name) == value for name, value in fields.items())
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_loading_peaks_near_the_size_of_the_weights(tmp_path):
    """In a process of its own: the high-water mark of memory above what the imports take, in weights."""
    config = JambaConfig.jamba(
        n_layers=4, d_model=512, d_vocab=4096, n_heads=8, n_key_value_heads=8, d_head=64, d_mlp=2048, num_experts=16
    )
    HookedJamba(config).save_pretrained(tmp_path)
    code = f"""
import resource, torch
from jambascope.checkpoint import load
import jambascope.model, safetensors.torch
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
ballast = torch.ones(64 << 20)  # lifts the high-water mark of the imports above their transient peak
before = peak(); ballast_bytes = ballast.nbytes; del ballast
model = load({str(tmp_path)!r})
weights = sum(p.nbytes for p in model.parameters())
print((peak() - before + ballast_bytes) / weights, weights)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[1]) > 300 << 20
    assert float(out[0]) <= 1.2


# -- what is refused -----------------------------------------------------------------------------------------


def refuse(directory, *words, error=CheckpointError):
    with pytest.raises(error) as caught:
        HookedJamba.from_pretrained(directory)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_missing_files(directory, tmp_path):
    (directory / "model.safetensors").unlink()
    refuse(directory, "model.safetensors", "does not exist")
    (directory / "config.json").unlink()
    refuse(directory, "config.json", "does not exist")
    refuse(tmp_path / "nowhere", "nowhere", "neither a directory nor a packaged model")
    refuse("jamba-micr", "'jamba-micr'", "did you mean 'jamba-micro'")


def test_truncated_and_foreign_files(directory):
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5], b"", b"\x80\x04" + b"x" * 64):
        path.write_bytes(damaged)
        refuse(directory, "model.safetensors", "truncated or not a safetensors file")
    (directory / "config.json").write_text('{"model_type": ')
    refuse(directory, "config.json", "cannot be read as JSON")


def test_pickles_are_never_opened(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refuse(directory, "pytorch_model.bin", "pickle", "refused", "save_pretrained")


def test_missing_surplus_and_misshapen_tensors(directory):
    name = "model.layers.3.feed_forward.experts.2.up_proj.weight"
    kept = {}
    rewrite(directory, lambda t: kept.update(value=t.pop(name)))
    refuse(directory, "missing 1 tensor(s)", name)
    rewrite(directory, lambda t: t.update({name: kept["value"][:-1].clone()}))
    refuse(directory, name, "(39, 32)", "(40, 32)")
    rewrite(directory, lambda t: t.update({name: kept["value"], "model.layers.7.extra": torch.ones(1)}))
    refuse(directory, "surplus 1 tensor(s)", "model.layers.7.extra")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none(value, directory):
    rewrite(directory, lambda t: t["model.layers.0.mamba.A_log"].view(-1).__setitem__(3, value))
    refuse(directory, "model.layers.0.mamba.A_log", "NaN or infinity")


def test_values_beyond_the_wanted_type(directory):
    rewrite(directory, lambda t: t["lm_head.weight"].view(-1).__setitem__(0, 1e6))
    with pytest.raises(CheckpointError, match=r"lm_head.weight holds values beyond torch.float16"):
        HookedJamba.from_pretrained(directory, dtype="float16")


@pytest.mark.parametrize("options", [dict(dtype="int4"), dict(dtype=torch.int32), dict(device="nonsense:9")], ids=str)
def test_devices_and_types_that_do_not_exist(options, directory, small_config):
    message = f"{next(iter(options))}='"
    with pytest.raises(ConfigError, match=message):
        HookedJamba.from_pretrained(directory, **options)
    with pytest.raises(ConfigError, match=message):
        HookedJamba(small_config, **options)


def test_types_that_cannot_be_weights(directory):
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
    refuse(directory, "lm_head.weight", "I8")


def test_broken_shards(hf_model, tmp_path):
    hf_model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    held = next(n for n, f in content["weight_map"].items() if f == first.name)
    moved = content["weight_map"] | {held: sorted(tmp_path.glob("model-*.safetensors"))[1].name}
    index.write_text(json.dumps({"weight_map": moved}))
    refuse(tmp_path, held, "does not hold")
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {held: "../elsewhere.safetensors"}}))
    refuse(tmp_path, "outside its directory")
    index.write_text(json.dumps(content))
    for nonsense in ([], None, {held: 3}):
        index.write_text(json.dumps({"weight_map": nonsense}))
        refuse(tmp_path, "index.json", "weight_map")
    index.write_text(json.dumps(content))
    first.unlink()
    refuse(tmp_path, first.name, "does not exist")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(model_type="llama"), ["model_type='llama'", "jamba, mamba"]),
        (dict(model_type=None), ["model_type=None"]),
        (dict(hidden_act="gelu"), ["hidden_act='gelu'", "silu"]),
        (dict(num_key_value_heads=3), ["n_key_value_heads=3", "must divide n_heads=4"]),
        (dict(num_experts_per_tok=9), ["experts_per_token=9", "num_experts=4"]),
        (dict(num_hidden_layers=0), ["n_layers=0", "at least 1"]),
        (dict(num_attention_heads=0), ["num_attention_heads=0"]),
        (dict(attn_layer_period=0), ["attn_layer_period=0"]),
        (dict(mamba_d_state=0), ["d_state=0"]),
        (dict(rms_norm_eps=0), ["eps=0"]),
        (dict(vocab_size="many"), ["d_vocab='many'"]),
        (dict(num_hidden_layers="4"), ["n_layers='4'"]),
        (dict(num_attention_heads="4"), ["of the wrong kind"]),
        (dict(eos_token_id=99), ["eos_token_ids=(99,)", "0..60"]),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_configurations_that_make_no_sense(fields, words, directory):
    edit_config(directory, **fields)
    refuse(directory, "config.json", *words, error=ConfigError)


def test_a_missing_field_is_named(directory):
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    del fields["intermediate_size"]
    path.write_text(json.dumps(fields))
    refuse(directory, "config.json", "intermediate_size", error=ConfigError)


def test_a_damaged_tokenizer_is_named(directory):
    (directory / "tokenizer.json").write_text("{")
    refuse(directory, "tokenizer", str(directory))


def test_saving_into_a_file_is_refused(small_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        small_model.save_pretrained(tmp_path / "file")


def test_published_configurations_are_read_and_written():
    """The fields that AI21 published for Jamba-v0.1, older ones included."""
    published = dict(
        model_type="jamba", attn_layer_offset=4, attn_layer_period=8, expert_layer_offset=1, expert_layer_period=2,
        hidden_act="silu", hidden_size=4096, intermediate_size=14336, mamba_conv_bias=True, mamba_d_conv=4,
        mamba_d_state=16, mamba_dt_rank=256, mamba_expand=2, mamba_inner_layernorms=True, mamba_proj_bias=False,
        num_attention_heads=32, num_experts=16, num_experts_per_tok=2, num_hidden_layers=32, num_key_value_heads=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-6, sliding_window=None,
        tie_word_embeddings=False, vocab_size=65536, torch_dtype="bfloat16", n_ctx=262144,
    )  # fmt: skip
    config = config_from_hf(published)
    assert config.attention_layers == (4, 12, 20, 28) and len(config.moe_layers) == 16
    assert (config.d_head, config.d_inner, config.dt_rank) == (128, 8192, 256)
    written = config_to_hf(config, torch.bfloat16)
    assert config_from_hf(written) == config
    assert all(written[k] == published[k] for k in written if k in published)
