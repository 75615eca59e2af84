"""From a folder or hub id to a frozen backbone with its tokenizer and hashes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils import logging

from bpt_dist.backbones.base import DTYPES, Backbone, hash_tokenizer
from bpt_dist.backbones.checkpoint import Checkpoint, Weights, first_line
from bpt_dist.backbones.families import DECODERS, kind_of
from bpt_dist.backbones.shapes import ModelShape, known_config
from bpt_dist.distributed.hub import reach_hub
from bpt_dist.errors import ConfigError
from bpt_dist.tasks.text_to_text import ENCODED, TextForm

GGUF = ".gguf"  # how files are called that are converted first


def identity_of(weights: Weights) -> str:
    """Return the hash over the files of the weights, which are read for it."""
    return weights.identity


def load(
    path: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    dtype: str = "fp32",
    attention: str = "auto",
    mapped: bool = False,
    identify: Callable[[Weights], str] = identity_of,
) -> Backbone:
    """Load a checkpoint from a folder or the hub, of whichever family its config.json names.

    Only safetensors are read and no remote code runs; the tokenizer comes from the same place.
    Every weight comes from the files, none is initialised at random; `identity` is the hash over exactly these files. Adapters and
    generation settings beside the weights are never used. `name` is what reports call it. `mapped` weights stay in the file, shared
    by the processes of a host, until they are moved. `identify` returns the hash; ranks of a host need not each read the files.

    Raises ConfigError when the folder is not such a checkpoint.
    """
    checkpoint = Checkpoint(path, revision)
    if not checkpoint.is_folder and not checkpoint.may_be_on_hub:
        made = "one made by `save_pretrained`, or a hub id"
        if path.endswith(GGUF):
            made = "the folder that `bpt-dist convert FILE FOLDER` makes of a GGUF file"
        raise ConfigError(f"backbone.path: there is no folder {path}; give {made}")
    if not checkpoint.is_folder:
        reach_hub()
    logging.disable_progress_bar()  # transformers': a bar for files that load in a moment, on every rank
    try:
        make = _decoder if kind_of(checkpoint) in DECODERS else _t5
        return make(checkpoint, name or path, dtype, attention, mapped, identify)
    except (OSError, ValueError, SafetensorError) as error:
        raise checkpoint.cannot_load(error) from error


def _t5(
    checkpoint: Checkpoint, name: str, dtype: str, attention: str, mapped: bool, identify: Callable[[Weights], str]
) -> Backbone:
    from bpt_dist.backbones.t5.config import complete_tokens, read_config
    from bpt_dist.backbones.t5.model import T5Backbone
    from bpt_dist.backbones.t5.weights import build_t5

    config = read_config(checkpoint)
    weights = checkpoint.weights()
    tokenizer = _load_tokenizer(checkpoint, config.vocab_size)
    complete_tokens(config, tokenizer, checkpoint)
    if attention != "auto":
        config._attn_implementation = attention
    model = build_t5(config, checkpoint, weights, DTYPES[dtype], mapped=mapped)
    facts: dict[str, Any] = {"name": name, "path": checkpoint.path, "revision": checkpoint.revision}
    return T5Backbone(model, tokenizer, identity=identify(weights), **facts)


def _decoder(
    checkpoint: Checkpoint, name: str, dtype: str, attention: str, mapped: bool, identify: Callable[[Weights], str]
) -> Backbone:
    from bpt_dist.backbones.decoder.config import complete_tokens, read_config, start_token
    from bpt_dist.backbones.decoder.model import DecoderBackbone
    from bpt_dist.backbones.decoder.weights import build_decoder

    config = read_config(checkpoint)
    weights = checkpoint.weights()
    # Gemma's tokenizer knows a special piece for pictures, for which a model of text has no row.
    tokenizer = _load_tokenizer(checkpoint, config.vocab_size, special_may_lack_rows=True)
    complete_tokens(config, tokenizer, checkpoint)
    start = start_token(config, tokenizer, checkpoint)
    if attention != "auto":
        config._attn_implementation = attention
    model = build_decoder(config, checkpoint, weights, DTYPES[dtype], mapped=mapped)
    facts: dict[str, Any] = {"name": name, "path": checkpoint.path, "revision": checkpoint.revision}
    return DecoderBackbone(model, tokenizer, start=start, identity=identify(weights), **facts)


def shape_of(path: str, *, revision: str | None = None, dtype: str = "fp32", ask_hub: bool = True) -> ModelShape:
    """Return the shape of a checkpoint of any family, by `known_config`: no weight is read.

    Raises ConfigError when nothing here or on the hub knows it.
    """
    from bpt_dist.backbones.decoder import config as decoder
    from bpt_dist.backbones.decoder import shapes as decoders
    from bpt_dist.backbones.t5 import config as t5
    from bpt_dist.backbones.t5 import shapes as t5s

    config = known_config(
        path, revision, ask_hub=ask_hub,
        read=lambda checkpoint: (decoder if kind_of(checkpoint) in DECODERS else t5).read_config(checkpoint),
        published=lambda name: t5s.published(name) or decoders.published(name),
    )  # fmt: skip
    return decoders.DecoderShape(config, dtype) if config.model_type in DECODERS else t5s.T5Shape(config, dtype)


def facts_of(path: str, *, revision: str | None = None) -> Mapping[str, Any]:
    """Return what an export records of a backbone (`Backbone.facts`), from its config.json alone; raises as `shape_of`."""
    return shape_of(path, revision=revision).facts


class Language(NamedTuple):
    """What texts of a checkpoint are made with: its tokenizer, the hash of that, and the form of a text."""

    tokenizer: Any
    sha256: str
    form: TextForm


def load_tokenizer(path: str, revision: str | None = None) -> Language:
    """Return the tokenizer of a checkpoint and its text form, as `load` has them. Raises ConfigError where there is none."""
    checkpoint, form = Checkpoint(path, revision), ENCODED
    try:
        if kind_of(checkpoint) in DECODERS:
            from bpt_dist.backbones.decoder.config import read_config, start_token

            config = read_config(checkpoint)
            tokenizer = _load_tokenizer(checkpoint, config.vocab_size, special_may_lack_rows=True)
            form = TextForm(continues=True, start=start_token(config, tokenizer, checkpoint))
        else:
            tokenizer = _load_tokenizer(checkpoint, int(checkpoint.config()["vocab_size"]))
    except (OSError, ValueError, KeyError) as error:
        raise checkpoint.cannot_load(error) from error
    return Language(tokenizer, hash_tokenizer(tokenizer), form)


def _load_tokenizer(checkpoint: Checkpoint, num_rows: int, *, special_may_lack_rows: bool = False) -> Any:
    path = checkpoint.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=checkpoint.revision, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a file it cannot read, the hub's client what it likes
        if not checkpoint.is_folder:
            raise OSError(f"its tokenizer: {first_line(error)}") from error
        raise checkpoint.error(f"has no usable tokenizer ({first_line(error)}); copy its tokenizer files again") from error
    # Without its files transformers makes an empty tokenizer, to which every text is a row of unknown pieces.
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) <= 1:
        raise checkpoint.error("has no tokenizer with a vocabulary; put its tokenizer.json beside the weights")
    num_pieces = len(tokenizer)
    if special_may_lack_rows:
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        num_pieces = 1 + max(index for index in tokenizer.get_vocab().values() if index not in special)
    if num_pieces > num_rows:
        raise ConfigError(
            f"backbone.path: the tokenizer in {path} has {num_pieces} pieces, the model only {num_rows} rows; "
            "they do not belong together; give the tokenizer that was saved with the weights"
        )
    return tokenizer
