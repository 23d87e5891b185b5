"""Checks generate against transformers' generate on random checkpoints, and by hand."""
import functools
import math

import pytest
import torch
from reference import CONFIGS, VOCAB, checkpoint

from generate import draw_tokens, forbid_repeats, generate, left_pad
from model import Config, Transformer
from support.errors import UserError

families = pytest.mark.parametrize("family", CONFIGS)
some_families = pytest.mark.parametrize("family", ["gpt2", "llama 3.1", "qwen3"])
NEVER = 10 ** 6           # as eos: a token that no model writes


@functools.cache
def prompts(count: int = 5, seed: int = 3) -> list[list[int]]:
    """Draws prompts of different lengths, without special tokens."""
    chance = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=chance).tolist()
            for length in torch.randint(1, 14, (count,), generator=chance).tolist()]


def by_transformers(model, batch, new, eos, **options) -> list[list[int]]:
    tokens, mask = left_pad(batch, 0, "cpu")
    with torch.no_grad():
        out = model.generate(tokens, attention_mask=mask.long(), max_new_tokens=new,
                             do_sample=False, eos_token_id=eos or NEVER, pad_token_id=0, **options)
    texts = [row[tokens.shape[1]:].tolist() for row in out]
    ends = [next((i for i, token in enumerate(text) if token in eos), len(text)) for text in texts]
    return [text[:end] for text, end in zip(texts, ends)]


def frequent_eos(family, count: int = 3) -> list[int]:
    """Lists tokens that the model often writes: as eos they end texts at different lengths."""
    _, _, ours = checkpoint(family)
    written = [token for text in generate(ours, prompts(), 20, eos=[]) for token in text[3:]]
    return sorted(set(written), key=lambda token: -written.count(token))[:count]


# ---- equal to transformers

@families
def test_greedy_tokens_equal_transformers(family):
    theirs, _, ours = checkpoint(family)
    assert generate(ours, prompts(), 30, eos=[]) == by_transformers(theirs, prompts(), 30, eos=[])


@families
def test_greedy_stops_at_eos_as_transformers(family):
    theirs, _, ours = checkpoint(family)
    for eos in (frequent_eos(family, 1), frequent_eos(family)):
        found = generate(ours, prompts(), 30, eos=eos)
        assert found == by_transformers(theirs, prompts(), 30, eos=eos)
        assert len({len(text) for text in found}) > 1


@pytest.mark.parametrize("family, length_penalty", [
    *((family, 0.8) for family in CONFIGS), *(("llama", penalty) for penalty in (1.0, 0.0, 2.0))])
def test_beams_equal_transformers(family, length_penalty):
    theirs, _, ours = checkpoint(family)
    for eos in (frequent_eos(family, 1), frequent_eos(family, 2)):
        found = generate(ours, prompts(), 16, beams=4, length_penalty=length_penalty, eos=eos)
        assert found == by_transformers(theirs, prompts(), 16, num_beams=4, eos=eos,
                                        length_penalty=length_penalty, early_stopping=False)


@some_families
def test_beams_that_repeat_no_ngram_equal_transformers(family):
    theirs, _, ours = checkpoint(family)
    eos = frequent_eos(family, 1)
    repetitive = [[5, 6, 7, 8] * 2 + prompt for prompt in prompts()]    # something to forbid
    for n in (4, 2):
        found = generate(ours, repetitive, 20, beams=4, length_penalty=0.8, no_repeat_ngram=n,
                         eos=eos)
        expected = [by_transformers(theirs, [p], 20, num_beams=4, eos=eos, length_penalty=0.8,
                                    no_repeat_ngram_size=n)[0] for p in repetitive]
        assert found == expected


@some_families
def test_greedy_that_repeats_no_ngram_equals_transformers(family):
    theirs, _, ours = checkpoint(family)
    found = generate(ours, prompts(), 40, no_repeat_ngram=2, eos=[])
    expected = [by_transformers(theirs, [p], 40, eos=[], no_repeat_ngram_size=2)[0]
                for p in prompts()]
    assert found == expected
    assert found != generate(ours, prompts(), 40, eos=[])


def test_ten_beams_equal_transformers():
    # The setting of LoRA's E2E experiments: 10 beams, length penalty 0.9, no repeated 4-gram.
    theirs, _, ours = checkpoint("gpt2")
    eos = frequent_eos("gpt2", 1)
    found = generate(ours, prompts(), 24, beams=10, length_penalty=0.9, no_repeat_ngram=4, eos=eos)
    assert found == [by_transformers(theirs, [p], 24, num_beams=10, eos=eos, length_penalty=0.9,
                                     no_repeat_ngram_size=4)[0] for p in prompts()]


# ---- properties

@some_families
@pytest.mark.parametrize("options", [dict(), dict(beams=4, length_penalty=0.8)],
                         ids=["greedy", "beams"])
def test_tokens_do_not_depend_on_the_rest_of_the_batch(family, options):
    _, _, ours = checkpoint(family)
    options = options | {"eos": frequent_eos(family, 1)}
    long = torch.randint(3, VOCAB, (110,), generator=torch.Generator().manual_seed(4)).tolist()
    batch = [long[:n] for n in (9, 1, 110, 3, 26, 70, 2, 45)]
    together = generate(ours, batch, 16, **options)
    assert together == [generate(ours, [p], 16, **options)[0] for p in batch]
    assert together[::-1] == generate(ours, batch[::-1], 16, **options)
    assert together[:3] == generate(ours, batch[:3], 16, **options)


@pytest.mark.parametrize("family", ["gpt2", "llama 3.1"])
def test_cached_tokens_equal_those_computed_from_scratch(family):
    _, _, ours = checkpoint(family)
    for prompt, found in zip(prompts(), generate(ours, prompts(), 20, eos=[])):
        text = list(prompt)
        with torch.no_grad():
            for _ in range(20):
                text.append(ours(torch.tensor([text]))[0, -1].argmax().item())
        assert found == text[len(prompt):]


def score(model, prompt, text, eos, length_penalty) -> float:
    whole = torch.tensor([prompt + text + [eos]])
    with torch.no_grad():
        logp = model(whole[:, :-1])[0, len(prompt) - 1:].log_softmax(-1)
    targets = whole[0, len(prompt):]
    return logp.gather(1, targets[:, None]).sum().item() / len(targets) ** length_penalty


def test_enough_beams_find_the_best_text_there_is():
    # 6 tokens, at most 2 written before eos: so many beams are an exhaustive search.
    shape = dict(vocab_size=6, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16,
                 max_positions=16)
    ours = Transformer(Config(**shape))
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.7, generator=torch.Generator().manual_seed(4))
    texts = [[], *([a] for a in range(5)), *([a, b] for a in range(5) for b in range(5))]
    best = max(texts, key=lambda text: score(ours, [1, 2], text, 5, 1.0))
    assert generate(ours, [[1, 2]], 3, beams=36, eos=5)[0][:2] == best


def test_beams_are_at_least_as_likely_as_greedy():
    _, _, ours = checkpoint("llama")
    for prompt in prompts():
        greedy, = generate(ours, [prompt], 8, eos=[])
        beams, = generate(ours, [prompt], 8, beams=8, eos=[])

        def logp(text):
            return score(ours, prompt, text[:-1], text[-1], 0.0)
        assert logp(beams) >= logp(greedy) - 1e-4


def test_one_beam_is_greedy():
    _, _, ours = checkpoint("llama")
    assert generate(ours, prompts(), 8, beams=1) == generate(ours, prompts(), 8)


def test_eos_defaults_to_the_configs():
    _, _, ours = checkpoint("llama")
    eos = frequent_eos("llama", 2)
    ours.config.eos, kept = eos, ours.config.eos
    try:
        assert generate(ours, prompts(), 20) == generate(ours, prompts(), 20, eos=eos)
        assert generate(ours, prompts(), 20, eos=[]) != generate(ours, prompts(), 20)
    finally:
        ours.config.eos = kept


def test_nothing_to_do_gives_nothing():
    _, _, ours = checkpoint("llama")
    for options in (dict(), dict(beams=4)):
        assert generate(ours, [], 5, **options) == []
        assert generate(ours, [[3], [4, 5]], 0, **options) == [[], []]


def test_generation_leaves_the_model_as_it_was():
    _, _, ours = checkpoint("llama")
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for training in (True, False):
        ours.train(training)
        generate(ours, prompts(), 4)
        generate(ours, prompts(), 4, beams=2)
        assert ours.training is training
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in ours.parameters())


# ---- sampling

def fixed(probabilities) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log().float()


def drawn(probabilities, top_p, temperature=1.0, times=2000) -> list[int]:
    """Counts how often each token is drawn."""
    chance = torch.Generator().manual_seed(0)
    logits = fixed(probabilities).expand(times, -1)
    tokens = draw_tokens(logits, temperature, top_p, chance)
    return tokens.bincount(minlength=logits.shape[1]).tolist()


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    # 0.5 + 0.25 = 0.75: the first two reach 0.7 and 0.75; 0.76 needs the third.
    probabilities = [0.125, 0.5, 0.125, 0.25]
    for top_p, kept in [(0.3, {1}), (0.5, {1}), (0.51, {1, 3}), (0.7, {1, 3}), (0.75, {1, 3}),
                        (0.76, {0, 1, 3}), (1.0, {0, 1, 2, 3})]:
        counts = drawn(probabilities, top_p)
        assert {token for token, count in enumerate(counts) if count} == kept, top_p


def test_kept_tokens_keep_their_proportions():
    counts = drawn([0.125, 0.5, 0.125, 0.25], 0.75, times=30000)
    assert counts[1] / counts[3] == pytest.approx(2, rel=0.05)


def test_temperature_sharpens_and_flattens():
    # Probabilities 1/4 and 3/4: at temperature 1/2 they count squared, 1/10 and 9/10.
    assert drawn([0.25, 0.75], 1.0, 0.5, 30000)[0] / 30000 == pytest.approx(0.1, abs=0.01)
    assert drawn([0.25, 0.75], 1.0, 1e4, 30000)[0] / 30000 == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-45])
def test_a_temperature_near_zero_is_greedy(temperature):
    _, _, ours = checkpoint("llama")
    assert generate(ours, prompts(), 20, temperature=temperature) == generate(ours, prompts(), 20)


def test_a_seed_repeats_what_was_drawn():
    _, _, ours = checkpoint("llama")
    a, b, c = (generate(ours, prompts(), 20, temperature=1.0, top_p=0.9, seed=seed, eos=[])
               for seed in (1, 1, 2))
    assert a == b != c
    unseeded = [generate(ours, prompts(), 20, temperature=1.0, eos=[]) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_sampling_leaves_the_global_generator_alone():
    _, _, ours = checkpoint("llama")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generate(ours, prompts(), 5, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


# ---- parts, and what is refused

def test_left_pad_by_hand():
    tokens, mask = left_pad([[5, 6, 7], [8]], 2, "cpu")
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_copy_prompt_lets_the_new_text_repeat_the_prompt_but_not_itself():
    _, _, ours = checkpoint("gpt2")
    for prompt in prompts():
        prompt = prompt + generate(ours, [prompt], 12, eos=[])[0] + prompt  # likely to be copied
        new = []
        for _ in range(20):                                             # the definition, slowly
            logits = ours(torch.tensor([prompt + new]))[0, -1:].detach()
            forbid_repeats(logits, [new], 2)
            new.append(logits.argmax().item())
        options = dict(no_repeat_ngram=2, eos=[])
        assert generate(ours, [prompt], 20, copy_prompt=True, **options)[0] == new
        assert generate(ours, [prompt], 20, **options)[0] != new
        beams = generate(ours, [prompt], 20, beams=3, copy_prompt=True, **options)[0]
        assert len(set(zip(beams, beams[1:]))) == 19
        plain = generate(ours, [prompt], 2, beams=3, eos=[])            # too short to repeat itself
        assert generate(ours, [prompt], 2, beams=3, copy_prompt=True, **options) == plain


def test_forbid_repeats_by_hand():
    # The text ends in 1 2, which was followed by 3 and by 4 before: both would repeat a trigram.
    for n, expected in [(3, {3, 4}), (2, {3, 4}), (1, {1, 2, 3, 4}), (4, set()), (9, set())]:
        logits = torch.zeros(1, 6)
        forbid_repeats(logits, [[1, 2, 3, 1, 2, 4, 1, 2]], n)
        assert {i for i, x in enumerate(logits[0].tolist()) if x == -math.inf} == expected, n


def test_beams_with_nothing_left_to_say_end():
    ours = Transformer(Config(3, 4, 1, 1, 1, 4, 4, 16)).init_weights()
    assert generate(ours, [[0]], 5, beams=2, no_repeat_ngram=1) == [[]]     # 4 more cannot follow


@pytest.mark.parametrize("batch, options, words", [
    ([[]], {}, "no tokens"),
    ([[3], []], {}, "no tokens"),
    ([[3]], dict(max_new_tokens=-1), "max_new_tokens"),
    ([[3]], dict(beams=0), "beams"),
    ([[3]], dict(temperature=-0.1), "temperature"),
    ([[3]], dict(temperature=math.nan), "temperature"),
    ([[3]], dict(top_p=0.0), "top_p"),
    ([[3]], dict(top_p=1.1), "top_p"),
    ([[3]], dict(top_p=math.nan), "top_p"),
    ([[3]], dict(beams=2, temperature=1.0), "temperature 0"),
    ([[3] * 125], dict(max_new_tokens=4), "128 positions"),
    ([[VOCAB]], {}, "vocabulary"),
    ([[-1]], {}, "vocabulary"),
])
def test_wrong_options_are_refused_in_one_line(batch, options, words):
    _, _, ours = checkpoint("llama")
    with pytest.raises(UserError, match=words) as caught:
        generate(ours, batch, **{"max_new_tokens": 3} | options)
    assert "\n" not in str(caught.value)


def test_the_last_position_can_be_used():
    _, _, ours = checkpoint("gpt2")
    assert len(generate(ours, [[3] * 125], 3, eos=[])[0]) == 3
