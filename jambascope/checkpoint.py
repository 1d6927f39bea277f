"""Hugging Face checkpoint directories <-> HookedJamba. Weights are untrusted input: safetensors only."""

from __future__ import annotations

import difflib
import json
import math
import os
import warnings
from collections.abc import Iterator
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jambascope.config import JambaConfig
from jambascope.devices import parse_device, parse_dtype
from jambascope.errors import CheckpointError, ConfigError
from jambascope.files import write_json
from jambascope.hf_format import Piece, config_from_hf, config_to_hf, pieces
from jambascope.kernels.experts.int8 import QUANTIZE, ExpertsInt8, is_quantized, quantize_rows
from jambascope.zoo import packaged_models

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
COPY_BYTES = 32 << 20
"""Weights move from the mapped file to their place in parts of at most this size."""
SHARD_BYTES = 5 << 30


# -- loading -------------------------------------------------------------------------------------------------


def load(
    name_or_path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
) -> HookedJamba:
    """Open a packaged model by name, a checkpoint directory, or a hub id.

    The tensors named in the file's header are compared with the model's before any is read; each then goes
    straight from the mapped file to its place, so that the peak stays near the size of the weights.

    Args:
        device: where the weights go; the CPU when None.
        dtype: their type; when None, that of the stored embedding (float32 for a packaged model).
        revision: of a hub id.
        quantize: ``"experts_int8"`` keeps expert weights as int8 with one scale per row (ExpertsInt8, arXiv
            2408.12570), quantised as they are read; such a model can be run and hooked, not trained or saved.

    Raises:
        CheckpointError: a missing, damaged or pickled file; a missing, surplus, misshapen or non-finite tensor.
        ConfigError: a config.json that describes no model of this family; a ``quantize`` that does not fit it.
    """
    from jambascope.model import HookedJamba

    device, dtype = parse_device(device), parse_dtype(dtype)
    directory = find_directory(name_or_path, revision)
    if dtype is None and directory in packaged_models().values():
        dtype = torch.float32  # bfloat16 is how they are packed, not how they are meant to be computed
    config, model_type = read_config(directory)
    check_quantize(quantize, config)
    where = locate_tensors(directory)
    model = HookedJamba(config, device="meta")
    parameters = dict(model.named_parameters())
    plan = _plan(parameters, config, model_type, where, directory)
    model.to(dtype or _stored_dtype(plan, where))
    if quantize is not None:
        for layer in config.moe_layers:
            model.blocks[layer].mlp.make_int8()
    model.allocate(device)
    with torch.no_grad():
        _copy_weights(_places(model), plan, where)
    model.tokenizer = load_tokenizer(directory)
    model.name_or_path = str(name_or_path)
    return model.eval()


def check_quantize(quantize: str | None, config: JambaConfig) -> None:
    """Raises ConfigError for a way to quantise that does not exist, or a model without experts to quantise."""
    if quantize not in (None, QUANTIZE):
        raise ConfigError(f"quantize={quantize!r} is not known; use {QUANTIZE!r}, or None for the weights as they are")
    if quantize is not None and not config.moe_layers:
        raise ConfigError(
            f"quantize={quantize!r}: this model has no MoE layer, and only experts are quantised; leave it out"
        )


def _places(model: HookedJamba) -> dict[str, torch.Tensor | ExpertsInt8]:
    """Where each parameter's values go; quantised ones under the name of the parameter whose place they took."""
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, ExpertsInt8)}
    return dict(model.named_parameters()) | quantized


def find_directory(name_or_path: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The directory of a packaged model, a local checkpoint or (downloaded, without weights if so asked) a hub id."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    packaged = packaged_models()
    if str(name_or_path) in packaged:
        return packaged[str(name_or_path)]
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the checkpoint's directory {path.parent}")
    if str(name_or_path).count("/") == 1 and not str(name_or_path).startswith((".", "/", "~")):
        return _download(str(name_or_path), revision, weights)
    near = difflib.get_close_matches(str(name_or_path), packaged, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise CheckpointError(
        f"{str(name_or_path)!r} is neither a directory nor a packaged model; {hint}packaged are {', '.join(packaged)}"
    )


def _download(hub_id: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except Exception as e:  # the hub client raises many kinds, from the network down
        raise CheckpointError(
            f"{hub_id!r} is not a directory here and could not be fetched from the hub: {_reason(e)}"
        ) from e


def _reason(e: Exception) -> str:
    """The first line of another library's message, which may be empty or run over pages."""
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__


def read_config(directory: Path) -> tuple[JambaConfig, str]:
    """The configuration and the ``model_type`` of a checkpoint directory."""
    path = directory / "config.json"
    raw = read_json(path, "a checkpoint directory needs a config.json")
    try:
        return config_from_hf(raw), raw["model_type"]
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file; ``remedy`` ends the message when it is missing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; {remedy}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON ({e}); restore the file") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object; restore the file")
    return value


def has_weights(directory: Path) -> bool:
    """Whether weights of any format lie in the directory (a download of the configuration alone has none)."""
    return any(p.suffix in (".safetensors", ".bin", ".pt", ".pth") for p in directory.iterdir())


def check_tensors(directory: Path, config: JambaConfig, model_type: str) -> bool:
    """Compare names, shapes and types in the files' headers with the configuration; raises as ``load`` does."""
    from jambascope.model import HookedJamba

    where = locate_tensors(directory)
    _plan(dict(HookedJamba(config, device="meta").named_parameters()), config, model_type, where, directory)
    return True


def identity(directory: Path) -> str:
    """sha256 of config.json and every file of weights, which says whether two directories hold the same model."""
    digest = sha256()
    for path in (directory / "config.json", *sorted(set(locate_tensors(directory).values()))):
        with path.open("rb") as file:
            digest.update(file_digest(file, "sha256").digest())
    return digest.hexdigest()


def locate_tensors(directory: Path) -> dict[str, Path]:
    """Which safetensors file holds each tensor, from the index where there is one."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index, "").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map from tensor names to file names; fetch it again")
        where = {name: directory / file for name, file in weight_map.items()}
        for path in sorted(set(where.values())):
            if path.parent != directory:
                raise CheckpointError(f"{index} points outside its directory: {path}; remove the entry")
            if not path.exists():
                raise CheckpointError(f"{path} does not exist, though {index.name} names it; fetch the missing shard")
            held = set(_keys(path))
            absent = [n for n, p in where.items() if p == path and n not in held]
            if absent:
                raise CheckpointError(
                    f"{path} does not hold {absent[0]!r}, though {index.name} says so; fetch it again"
                )
        return where
    if single.exists():
        return dict.fromkeys(_keys(single), single)
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory / pickles[0]} is a pickle, which can run code when opened, and is refused; "
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) "
            "writes safetensors"
        )
    raise CheckpointError(f"{single} does not exist; a checkpoint directory needs it, or an index with its shards")


def _keys(path: Path) -> list[str]:
    with _open(path) as f:
        return list(f.keys())


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({e}); fetch it again") from None


def _plan(
    parameters: dict[str, torch.Tensor],
    config: JambaConfig,
    model_type: str,
    where: dict[str, Path],
    directory: Path,
) -> list[Piece]:
    """The pieces to copy, grouped by file; raises when names, shapes or types do not fit the configuration."""
    plan = list(pieces(parameters, config, model_type, where))
    expected = {piece.file_name for piece in plan}
    missing = [piece.file_name for piece in plan if piece.file_name not in where]
    if missing:
        raise CheckpointError(_listing(f"{directory}: missing", missing, "config.json asks for them"))
    surplus = sorted(set(where) - expected - ({"lm_head.weight"} if config.tie_embeddings else set()))
    if surplus:
        raise CheckpointError(_listing(f"{directory}: surplus", surplus, "config.json has no place for them"))
    plan.sort(key=lambda piece: str(where[piece.file_name]))
    for path, group in _by_file(plan, where):
        with _open(path) as f:
            for piece in group:
                stored = f.get_slice(piece.file_name)
                shape, needed = tuple(stored.get_shape()), tuple(piece.part(parameters[piece.parameter]).shape)
                if shape != needed:
                    raise CheckpointError(f"{path}: {piece.file_name} has shape {shape}; config.json asks for {needed}")
                if stored.get_dtype() not in DTYPES:
                    raise CheckpointError(
                        f"{path}: {piece.file_name} is stored as {stored.get_dtype()}; "
                        "convert it to float32, bfloat16 or float16"
                    )
    return plan


def _listing(head: str, names: list[str], tail: str) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{head} {len(names)} tensor(s): {', '.join(names[:3])}{more}; {tail}"


def _by_file(plan: list[Piece], where: dict[str, Path]) -> Iterator[tuple[Path, list[Piece]]]:
    for path in dict.fromkeys(where[piece.file_name] for piece in plan):
        yield path, [piece for piece in plan if where[piece.file_name] == path]


def _stored_dtype(plan: list[Piece], where: dict[str, Path]) -> torch.dtype:
    name = next(piece.file_name for piece in plan if piece.parameter == "embed.weight")
    with _open(where[name]) as f:
        return DTYPES[f.get_slice(name).get_dtype()]


def _copy_weights(places: dict[str, torch.Tensor | ExpertsInt8], plan: list[Piece], where: dict[str, Path]) -> None:
    for path, group in _by_file(plan, where):
        for batch in _batches(group, places):
            # Opened anew for every batch: pages of the mapped file count as ours until the mapping is closed.
            with _open(path) as f:
                for piece, rows in batch:
                    values = f.get_slice(piece.file_name)[rows] if rows is not None else f.get_tensor(piece.file_name)
                    if not _finite(values):
                        raise CheckpointError(f"{path}: {piece.file_name} holds NaN or infinity; fetch the file again")
                    place = places[piece.parameter]
                    if isinstance(place, ExpertsInt8):
                        values, scale = quantize_rows(values)
                        if not _finite(scale):
                            raise CheckpointError(
                                f"{path}: {piece.file_name} holds values beyond {scale.dtype}; load it in a wider dtype"
                            )
                        _part(piece, place.scale, rows).copy_(scale)
                        place = place.values
                    placed = _part(piece, place, rows).copy_(values)
                    if placed.dtype != values.dtype and not _finite(placed):
                        raise CheckpointError(
                            f"{path}: {piece.file_name} holds values beyond {placed.dtype}; load it in a wider dtype"
                        )
                    del values, placed


def _finite(values: torch.Tensor) -> bool:
    """Whether nothing is NaN or infinite: extremes carry both, and are found in one pass that keeps nothing."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(values)) if values.numel() else True


def _part(piece: Piece, place: torch.Tensor, rows: slice | None) -> torch.Tensor:
    return piece.part(place) if rows is None else piece.part(place)[rows]


def _batches(
    group: list[Piece], places: dict[str, torch.Tensor | ExpertsInt8]
) -> Iterator[list[tuple[Piece, slice | None]]]:
    """The pieces of one file, large ones cut into row ranges, in batches of at most about COPY_BYTES."""
    batch: list[tuple[Piece, slice | None]] = []
    held = 0
    for piece in group:
        place = places[piece.parameter]
        target = piece.part(place.values if isinstance(place, ExpertsInt8) else place)
        if target.nbytes <= COPY_BYTES:
            ranges: list[slice | None] = [None]
        else:
            step = max(1, COPY_BYTES * target.shape[0] // target.nbytes)
            ranges = [slice(a, min(a + step, target.shape[0])) for a in range(0, target.shape[0], step)]
        for rows in ranges:
            size = target.nbytes if rows is None else target[rows].nbytes
            if batch and held + size > COPY_BYTES:
                yield batch
                batch, held = [], 0
            batch.append((piece, rows))
            held += size
    if batch:
        yield batch


def load_tokenizer(directory: Path) -> Any:
    """The checkpoint's own tokenizer, or None when the directory has none."""
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of a model type of ours it warns that it is none of its own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # whatever a damaged tokenizer file makes transformers or tokenizers raise
        raise CheckpointError(
            f"the tokenizer in {directory} cannot be opened ({_reason(e)}); "
            "restore its files, or remove them to use token ids"
        ) from e
    finally:
        logging.set_verbosity(verbosity)


# -- saving --------------------------------------------------------------------------------------------------


def save(model: HookedJamba, directory: str | Path) -> None:
    """Write config.json, safetensors (sharded at 5 GiB) and the tokenizer; transformers opens the result.

    Models that transformers cannot describe are written as ``model_type`` ``jambascope``, which only we open.
    Files appear under their names only when complete.

    Raises:
        CheckpointError: a directory that is a file; a quantised model, whose weights are no longer those to save.
    """
    if is_quantized(model):
        raise CheckpointError(
            f"a model loaded with quantize={QUANTIZE!r} holds rounded expert weights and cannot be saved; "
            "load it without quantize and save that"
        )
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; give a directory to save into")
    directory.mkdir(parents=True, exist_ok=True)
    hf = config_to_hf(model.config, model.dtype)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    shards: list[list[Piece]] = [[]]
    held = 0
    for piece in pieces(parameters, model.config, hf["model_type"]):
        size = piece.part(parameters[piece.parameter]).nbytes
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += size
    weight_map = {}
    umask = os.umask(0)
    os.umask(umask)
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {p.file_name: p.part(parameters[p.parameter]).cpu().clone() for p in shard}
        save_file(tensors, directory / (name + ".tmp"), metadata={"format": "pt"})
        os.chmod(directory / (name + ".tmp"), 0o666 & ~umask)  # safetensors makes files that only their owner reads
        os.replace(directory / (name + ".tmp"), directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = directory / "model.safetensors.index.json"
    if len(shards) > 1:
        total = sum(p.nbytes for p in parameters.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        index.unlink(missing_ok=True)
    for stale in {directory / "model.safetensors", *directory.glob("model-*-of-*.safetensors")}:
        if stale.name not in weight_map.values():  # of an earlier save; a reader might prefer it
            stale.unlink(missing_ok=True)
    write_json(directory / "config.json", hf)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(directory)
