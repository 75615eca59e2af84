"""How a soft prompt starts, and where it stands before the text; orthogonal to what a method does with it."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from bpt_dist.backbone import Backbone
from bpt_dist.errors import ConfigError
from bpt_dist.prompt_files import read_prompt
from bpt_dist.settings.prompt import PromptOptions

COMMON_PIECES = 5000  # Lester et al. (2021) sample from the most common pieces; T5 vocabularies are sorted by frequency


def initial_prompt(options: PromptOptions, backbone: Backbone, generator: torch.Generator) -> Float[Tensor, "P D"]:
    """Return the prompt training starts from, in float32.

    `vocabulary`: distinct rows of the word-embedding table, drawn from its 5,000 most common ordinary pieces (Lester et al. 2021).
    `normal`: N(0, scale^2). `uniform`: U(-scale, scale). `text`: the rows of a text's pieces, repeated to the length.
    `file`: a stored prompt.
    """
    length, width = options.length, backbone.width
    if options.init == "normal":
        return (options.init_scale or 1.0) * torch.randn(length, width, generator=generator)
    if options.init == "uniform":
        return (options.init_scale or 0.5) * (2 * torch.rand(length, width, generator=generator) - 1)
    if options.init == "file":
        assert options.init_file is not None
        return read_prompt(options.init_file, width)
    return backbone.vocabulary_rows(_pieces(options.init, length, backbone, generator, options.init_text)).cpu()


def _pieces(kind: str, length: int, backbone: Backbone, generator: torch.Generator, text: str | None) -> Tensor:
    if kind == "text":
        ids = backbone.tokenizer(text or "", add_special_tokens=False).input_ids
        if not ids:
            raise ConfigError("method.init_text: the text has no pieces; method.init=text needs some words")
        return torch.tensor((ids * (length // len(ids) + 1))[:length])
    special = set(backbone.tokenizer.all_special_ids)
    ordinary = [piece for piece in range(min(len(backbone.tokenizer), COMMON_PIECES)) if piece not in special]
    if length > len(ordinary):
        raise ConfigError(f"method.length: {length} exceeds the {len(ordinary)} ordinary pieces of the vocabulary; use init=normal")
    return torch.tensor(ordinary)[torch.randperm(len(ordinary), generator=generator)[:length]]


def similarities(
    prompt: Float[Tensor, "P D"], others: Float[Tensor, "K Q D"], kind: Literal["average_tokens", "per_token"]
) -> Float[Tensor, " K"]:
    """Return the cosine similarity, -1 to 1, of a prompt to each of the others (Vu et al. 2022, section 4.1).

    `average_tokens`: cosine of the two prompts averaged over positions. `per_token`: mean cosine over all pairs of positions.
    """
    if kind == "average_tokens":
        return functional.cosine_similarity(prompt.mean(dim=0)[None], others.mean(dim=1), dim=-1)
    # The mean over pairs of directions is the product of the mean directions.
    return functional.normalize(others, dim=-1).mean(dim=1) @ functional.normalize(prompt, dim=-1).mean(dim=0)


def mixture_weights(similarity: Float[Tensor, " K"], top_k: int) -> Float[Tensor, " K"]:
    """Return weights that sum to 1: similarity over its sum among the `top_k` most similar, 0 for the others (Vu et al. 2022).

    A prompt that points away is no help, so negative similarities weigh nothing beside the best, which always counts.
    """
    best = similarity.topk(min(top_k, len(similarity)))
    share = best.values.clamp_min(0)
    # The first of the best stands alone where nothing is similar: 0 / 0 otherwise.
    alone = torch.zeros_like(share)
    alone[0] = 1
    share = torch.where(share.sum() > 0, share / share.sum().clamp_min(torch.finfo(share.dtype).tiny), alone)
    return torch.zeros_like(similarity).scatter(0, best.indices, share)


def prepend(prompts: Float[Tensor, "m P D"], embeds: Float[Tensor, "N T D"]) -> Float[Tensor, "m N L D"]:
    """Put each of the m prompts before each of the N texts; L = P + T."""
    return prepend_own(prompts[:, None].expand(-1, len(embeds), -1, -1), embeds)


def prepend_own(prompts: Float[Tensor, "m N P D"], embeds: Float[Tensor, "N T D"]) -> Float[Tensor, "m N L D"]:
    """Put before the n-th text the n-th of each particle's prompts."""
    return torch.cat([prompts.to(embeds), embeds[None].expand(len(prompts), -1, -1, -1)], dim=2)
