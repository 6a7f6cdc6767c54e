"""A new model that can repeat what it has read, before it has learned anything.

An agent copies: the thing that its task names, the number of a product. Transformers copy by induction heads (Elhage et
al. 2021, https://transformer-circuits.pub/2021/framework; Olsson et al. 2022, https://arxiv.org/abs/2209.11895): a head
attends to the token before; a head of a later layer looks for a place whose token before was the present token, and
repeats what stands there. Here they look two tokens back: a piece of a word (`pl` of `plug and play`) says too little.
And by heads that move a token's name to the output from wherever they attend to (Wang et al. 2022,
https://arxiv.org/abs/2211.00593). A model of the Hub brings both from its pretraining. A small model with random
weights needs more tokens to grow them than a laptop reads in its quarter of an hour, and without them it says plausible
things about the wrong object. So they are written into a new model, and training goes on from there.

The residual stream, [hidden], is split in four, and the output layer reads the last part alone:

    constant, content   what the token is: a random vector, and a 1 in front, the same for all tokens
    previous            what the token before was: written by the first head of layer 0
    earlier             what the token before that was: written by its second head
    output              what comes next, in a random code of the contents: written by the heads of layer 1, which find
                        it, and by half of the heads of the layers after, whose places to look at training finds

All other weights stay random. Shapes: V tokens, D hidden, C contents, K width of a head, M what is remembered of a
token before, O output.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

THETA = 1e7
"""Base of the rotary positions: slow enough that tokens are recognised at two thousand tokens' distance."""
FAST, SLOW = 0.05, 5e-4
"""Radians a token: rotary frequencies above FAST tell neighbours apart; those below SLOW hardly see a distance."""
NEIGHBOUR = 12.0
"""Nats by which a head of layer 0 prefers the token at its distance to those beside it."""
MATCH, LONGER_MATCH = 25.0, 15.0
"""Nats by which a place after the present token is preferred, and by which more if the token before is the same too."""
APART = 1.0
"""How far tokens of one spelling are from each other, beside 1 for what they share: near enough that a search begins in
an instruction's words, far enough that ` fume` is not said for `fume`."""
GAIN = 8.0
"""How loudly the heads say what comes next: loud enough that one of ten candidates is louder than habit."""


@torch.no_grad()
def install(model: Any, spellings: Sequence[str], seed: int) -> None:
    """Write the heads into a new Llama, in place.

    Args:
        model: a `LlamaForCausalLM` of at least two layers and two heads with an output layer of its own, all heads with
            keys of their own, norms at their initial 1, and rotary base `THETA`.
        spellings: for each token, what it spells without a space in front. Tokens of one spelling are near to each
            other, so that ` dark` is found again in `click[dark`.
        seed: of the random codes.
    """
    config = model.config
    width = config.hidden_size // config.num_attention_heads  # K
    memory = min(width, config.hidden_size // 4)  # M
    contents = (config.hidden_size - 2 * memory) // 2 - 1  # C
    content = slice(1, 1 + contents)
    previous = slice(content.stop, content.stop + memory)
    earlier = slice(previous.stop, previous.stop + memory)
    output = slice(earlier.stop, config.hidden_size)
    draw = torch.Generator().manual_seed(seed)
    first, second, *others = (layer.self_attn for layer in model.model.layers)
    frequencies = THETA ** (-torch.arange(width // 2) / (width // 2))  # [K/2]

    tokens = _codes(spellings, contents, draw)  # [V, C]
    embedding = model.model.embed_tokens.weight.zero_()
    embedding[:, 0], embedding[:, content] = 1, tokens
    said = _directions(memory, contents, draw)  # [M, C]: how contents are told to the places after
    code = torch.randn(config.hidden_size - output.start, contents, generator=draw) / math.sqrt(contents)  # [O, C]

    scale = math.sqrt(2 / config.hidden_size)  # what the norm divides by: constant and content have length 1 each
    for distance, place in enumerate((previous, earlier), 1):
        rows = slice((distance - 1) * width, distance * width)
        _silence(first, rows)
        queries, keys = _back(distance, frequencies)
        beside = queries @ _back(1, frequencies)[1]  # the product for a token that is one further or one nearer
        strength = scale * math.sqrt(NEIGHBOUR * math.sqrt(width) / float(queries @ queries - beside))
        first.q_proj.weight[rows, 0], first.k_proj.weight[rows, 0] = strength * queries, strength * keys
        first.v_proj.weight[rows, content][:memory] = scale * said
        first.o_proj.weight[place, rows][:, :memory] = torch.eye(memory)

    heard = min(1.0, memory / contents)  # squared length of what is said of a token of length 1
    scale = math.sqrt((2 + 2 * heard) / config.hidden_size)
    steady = torch.cat([frequencies < SLOW] * 2).nonzero().flatten()
    for head in range(config.num_attention_heads):
        rows = slice(head * width, (head + 1) * width)
        _silence(second, rows)
        for nats, now, then in ((MATCH, said, previous), (LONGER_MATCH, torch.eye(memory), earlier)):
            strength = scale * math.sqrt(nats * math.sqrt(width) / (heard * min(1, len(steady) / memory)))
            compared = torch.zeros(width, memory)
            compared[steady] = _directions(len(steady), memory, draw)
            second.q_proj.weight[rows, content if then is previous else previous] += strength * compared @ now
            second.k_proj.weight[rows, then] = strength * compared
        _repeat(second, rows, content, output, scale * GAIN, code, draw)
    for later in others:
        for head in range(config.num_attention_heads // 2):
            rows = slice(head * width, (head + 1) * width)
            later.v_proj.weight[rows], later.o_proj.weight[:, rows] = 0, 0
            _repeat(later, rows, content, output, GAIN, code, draw)  # not scaled: at first they attend to all

    model.lm_head.weight.zero_()
    model.lm_head.weight[:, output] = normalize(tokens @ code.T)


def _codes(spellings: Sequence[str], contents: int, draw: torch.Generator) -> Tensor:
    """A random vector of length 1 for each token, [V, C]; those of one spelling are near to each other."""
    number = {spelling: place for place, spelling in enumerate(dict.fromkeys(spellings))}
    shared = normalize(torch.randn(len(number), contents, generator=draw))
    own = normalize(torch.randn(len(spellings), contents, generator=draw))
    return normalize(shared[[number[spelling] for spelling in spellings]] + APART * own)


def _silence(attention: Any, rows: slice) -> None:
    """Set the weights of a head to 0."""
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[rows] = 0
    attention.o_proj.weight[:, rows] = 0


def _repeat(attention: Any, rows: slice, content: slice, output: slice, gain: float, code: Tensor, draw: Any) -> None:
    """Let a head say the tokens that it attends to: their contents, in `code`, come out in the output."""
    directions = _directions(rows.stop - rows.start, code.shape[1], draw)
    attention.v_proj.weight[rows, content] = directions
    attention.o_proj.weight[output, rows] = gain * code @ directions.T


def _back(distance: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """A query and a key, [K] both, whose product rotary positions make greatest for the token so many places back.

    Of a pair of coordinates that turns by f a token, the product is cos(f (distance + key's place - query's place)).
    """
    fast = frequencies > FAST
    query = torch.cat([fast.float(), torch.zeros_like(frequencies)])
    key = torch.cat([fast * torch.cos(distance * frequencies), fast * torch.sin(distance * frequencies)])
    return query, key


def _directions(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """A random matrix, [rows, columns], whose shorter side is orthonormal."""
    found: Tensor = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=draw))[0]
    return found if rows >= columns else found.T
