"""Writes new tokens with a Transformer: greedy, by sampling or by beam search.

Prompts of different lengths make one batch: the shorter ones are padded on the left. A mask hides
the padding, and positions count real tokens only. Without both, a score would change with the
batch size (LLM-Adapters issue 61). Keys and values are cached: each new token costs one pass over
one position.
"""
import math

import torch
from torch import Tensor

from support.errors import UserError


def generate(model, prompts: list[list[int]], max_new_tokens: int, beams: int = 1,
             temperature: float = 0.0, top_p: float = 1.0, length_penalty: float = 1.0,
             no_repeat_ngram: int = 0, eos: int | list[int] | None = None,
             seed: int | None = None, copy_prompt: bool = False) -> list[list[int]]:
    """Returns the new tokens of each prompt, cut before eos.

    temperature: 0 takes the likeliest token each time (greedy). Otherwise tokens are drawn from
        softmax(logits / temperature).
    top_p: a token is drawn from the smallest set of likeliest tokens whose probability reaches
        top_p (Holtzman et al. 2019).
    beams: more than 1 searches for the likeliest text, and returns the best that it found. Texts
        are compared by sum of log-probabilities / length^length_penalty, as in transformers.
    no_repeat_ngram: n forbids a token that would repeat n tokens of the sequence, prompt included,
        as in transformers.
    copy_prompt: True lets no_repeat_ngram look at the new tokens only. So a name in the prompt can
        be written again.
    eos: the token, or a list of tokens, that ends a text. None stands for the config's.
    seed: starts the generator of the draws. None draws differently each time.

    A prompt gets the same tokens whatever it is batched with, unless they are drawn.
    Raises UserError if a prompt is empty, a token is outside the vocabulary, an option is out of
    its range, or a sequence is longer than the model's positions.
    """
    eos = model.config.eos if eos is None else eos
    eos = [eos] if isinstance(eos, int) else list(eos)
    check_arguments(model, prompts, max_new_tokens, beams, temperature, top_p)
    before = [[] for _ in prompts] if copy_prompt else prompts  # for no_repeat_ngram
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if beams > 1:
                return beam_search(model, prompts, before, max_new_tokens, beams, length_penalty,
                                   no_repeat_ngram, eos)
            device = model.embed.weight.device
            chance = torch.Generator(device)
            chance.manual_seed(seed) if seed is not None else chance.seed()
            pick = (lambda logits: logits.argmax(-1)) if temperature == 0 else (
                lambda logits: draw_tokens(logits, temperature, top_p, chance))
            return write_one_by_one(model, prompts, before, max_new_tokens, pick,
                                    no_repeat_ngram, eos)
    finally:
        model.train(was_training)


def check_arguments(model, prompts, max_new_tokens, beams, temperature, top_p) -> None:
    """Raises UserError if generate() cannot do this."""
    longest = max((len(p) for p in prompts), default=0)
    if any(len(p) == 0 for p in prompts):
        raise UserError("a prompt has no tokens: begin it with the tokenizer's bos")
    vocab = model.config.vocab_size
    if any(not 0 <= token < vocab for prompt in prompts for token in prompt):
        raise UserError(f"a prompt has a token outside the model's vocabulary of {vocab}")
    if max_new_tokens < 0 or beams < 1 or not temperature >= 0 or not 0 < top_p <= 1:
        raise UserError(f"generate needs max_new_tokens >= 0, beams >= 1, temperature >= 0 and "
                        f"0 < top_p <= 1; got {max_new_tokens}, {beams}, {temperature}, {top_p}")
    if beams > 1 and temperature > 0:
        raise UserError("beams search for the likeliest text: use temperature 0 with them")
    if longest + max_new_tokens > model.config.max_positions:
        raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
                        f"model's {model.config.max_positions} positions")


def left_pad(prompts: list[list[int]], new: int, device) -> tuple[Tensor, Tensor]:
    """Pads the prompts on the left -> tokens (B, T), mask (B, T + new).

    The mask is True for real tokens and for the new ones that will follow.
    """
    T = max(len(p) for p in prompts)
    tokens = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[False] * (T - len(p)) + [True] * (len(p) + new) for p in prompts],
                        device=device)
    return tokens, mask


def read_prompts(model, prompts, new):
    """Reads the prompts -> logits of the next token (B, vocab), cache, mask (B, T + new)."""
    tokens, mask = left_pad(prompts, new, model.embed.weight.device)
    cache = model.make_cache(*mask.shape)
    if mask.all():
        mask = None                          # without padding, attention needs no mask
    visible = None if mask is None else mask[:, :tokens.shape[1]]
    return model.logits(model.hidden(tokens, visible, cache)[:, -1]).float(), cache, mask


def read_token(model, tokens: Tensor, cache, mask: Tensor | None) -> Tensor:
    """Reads one more token of each row: tokens (B,) -> logits of the next (B, vocab)."""
    visible = None if mask is None else mask[:, :cache.used + 1]
    return model(tokens[:, None], visible, cache)[:, -1].float()


def write_one_by_one(model, prompts, before, max_new_tokens, pick, no_repeat_ngram, eos):
    """Writes token after token, greedy or drawn: `pick` turns logits (B, vocab) into tokens (B,).

    before: the tokens of each row that no_repeat_ngram reads before the new ones.
    """
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    new = [[] for _ in prompts]
    done = [False] * len(prompts)
    logits, cache, mask = read_prompts(model, prompts, max_new_tokens)
    for step in range(max_new_tokens):
        if no_repeat_ngram > 0:
            forbid_repeats(logits, [b + n for b, n in zip(before, new)], no_repeat_ngram)
        tokens = pick(logits)
        for i, token in enumerate(tokens.tolist()):
            done[i] = done[i] or token in eos
            if not done[i]:
                new[i].append(token)
        if all(done) or step + 1 == max_new_tokens:
            break
        logits = read_token(model, tokens, cache, mask)
    return new


def draw_tokens(logits: Tensor, temperature: float, top_p: float,
                chance: torch.Generator) -> Tensor:
    """Draws a token for each row of logits (B, vocab) -> (B,).

    Only the likeliest tokens take part, as many as it takes for their sum to reach top_p.
    """
    logits = logits - logits.amax(-1, keepdim=True)     # so that a tiny temperature gives no inf
    probs, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    better = probs.cumsum(-1) - probs               # probability of all likelier tokens
    probs = probs.masked_fill(better >= top_p, 0)
    return order.gather(-1, torch.multinomial(probs, 1, generator=chance))[:, 0]


def forbid_repeats(logits: Tensor, sequences: list[list[int]], n: int) -> None:
    """Sets the logit of each token to -inf that would end an n-gram its sequence already holds."""
    for row, sequence in zip(logits, sequences):
        tail = sequence[len(sequence) - n + 1:]
        for i in range(len(sequence) - n + 1):
            if sequence[i:i + n - 1] == tail:
                row[sequence[i + n - 1]] = -torch.inf


def beam_search(model, prompts, before, max_new_tokens, K, length_penalty, no_repeat_ngram, eos):
    """Keeps the K likeliest unfinished texts of each prompt, and its K best finished ones.

    Each step lengthens every unfinished text by one token. The likeliest results are the
    candidates. One of the K best is finished if it ends in eos or the step is the last. Its score
    is the sum of log p / length^length_penalty, eos counted.
    A prompt is done when it has K finished texts, and its best unfinished text, scored at its
    present length, is no better than the worst of them. This is the rule of transformers'
    early_stopping=False.
    """
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    B = len(prompts)
    logits, cache, mask = read_prompts(model, prompts, max_new_tokens)
    prompt_length = cache.used
    cache.repeat(K)
    logits = logits.repeat_interleave(K, dim=0)
    mask = None if mask is None else mask.repeat_interleave(K, dim=0)
    scores = torch.full((B, K), -torch.inf, device=logits.device)
    scores[:, 0] = 0                                # at first the K beams are all the same
    texts = [[[] for _ in range(K)] for _ in prompts]
    finished = [[] for _ in prompts]                # (score, tokens), at most K, best first
    done = [False] * B
    for length in range(1, max_new_tokens + 1):
        logp = logits.log_softmax(-1)
        if no_repeat_ngram > 0:
            whole = [before[i] + text for i in range(B) for text in texts[i]]
            forbid_repeats(logp, whole, no_repeat_ngram)
        vocab = logp.shape[-1]
        total = (scores[:, :, None] + logp.view(B, K, vocab)).view(B, -1)
        best, where = total.topk(min((1 + len(eos)) * K, total.shape[1]))   # K remain without eos
        alive = []                                  # for each prompt K times (score, beam, token)
        for i, (values, places) in enumerate(zip(best.tolist(), where.tolist())):
            candidates = [(v, *divmod(place, vocab)) for v, place in zip(values, places)]
            for score, beam, token in candidates[:K]:
                ends, last = token in eos, length == max_new_tokens
                if (ends or last) and score > -math.inf and not done[i]:
                    text = texts[i][beam] + ([] if ends else [token])
                    finished[i].append((score / length ** length_penalty, text))
            finished[i] = sorted(finished[i], key=lambda pair: -pair[0])[:K]
            alive.append([c for c in candidates if c[2] not in eos][:K])
            texts[i] = [texts[i][beam] + [token] for _, beam, token in alive[i]]
            done[i] = done[i] or (len(finished[i]) == K and alive[i][0][0]
                                  / length ** length_penalty <= finished[i][-1][0])
        if all(done) or length == max_new_tokens:
            break
        scores, beam, tokens = (torch.tensor([[c[n] for c in row] for row in alive],
                                             device=logits.device) for n in range(3))
        rows = torch.arange(B, device=logits.device)[:, None] * K + beam
        cache.reorder(rows.view(-1), prompt_length)
        logits = read_token(model, tokens.view(-1), cache, mask)
    return [texts[0][1] if texts else [] for texts in finished]
