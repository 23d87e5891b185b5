"""Learns a BPE vocabulary from a text: the tokenizer of data/base."""
from collections import Counter, defaultdict

import regex

from formats.bpe import BYTES, GPT2_SPLIT
from support.errors import UserError


def train_bpe(text: str, vocab_size: int) -> dict[bytes, int]:
    """Learns BPE on `text` with the GPT-2 split: token -> rank, the 256 bytes first.

    Each step joins the most frequent pair of neighbours, of equally frequent ones the first in the
    text. So the ranks are those of tiktoken._educational.bpe_train. This one is faster: it keeps
    each distinct word once, and visits only the words that hold the pair.
    Raises UserError if vocab_size is below 256 or the text has too few pairs.
    """
    if vocab_size < 256:
        raise UserError(f"vocab_size {vocab_size}: at least 256, a token for each byte")
    frequency = Counter(regex.findall(GPT2_SPLIT, text))
    words = [[bytes([byte]) for byte in word.encode()] for word in frequency]
    copies, count, holders = list(frequency.values()), Counter(), defaultdict(set)

    def tally(w: int, sign: int) -> None:
        """Counts the pairs of word w, or takes them off the count."""
        for pair in zip(words[w], words[w][1:]):
            count[pair] += sign * copies[w]
            holders[pair].add(w) if sign > 0 else holders[pair].discard(w)

    def first_place(pair: tuple[bytes, bytes]) -> tuple[int, int]:
        """Finds the first word that holds the pair, and the pair's place in it."""
        w = min(holders[pair])
        return w, list(zip(words[w], words[w][1:])).index(pair)

    for w in range(len(words)):
        tally(w, +1)
    ranks = {byte: rank for rank, byte in enumerate(BYTES)}
    while len(ranks) < vocab_size:
        most = max(count.values(), default=0)
        if most == 0:
            raise UserError(f"the text gives {len(ranks)} tokens, fewer than {vocab_size}")
        pair = min((p for p, n in count.items() if n == most), key=first_place)
        ranks[pair[0] + pair[1]] = len(ranks)
        for w in list(holders[pair]):
            tally(w, -1)
            for at in range(len(words[w])):                  # the list gets shorter on the way
                if tuple(words[w][at:at + 2]) == pair:
                    words[w][at:at + 2] = [pair[0] + pair[1]]
            tally(w, +1)
    return ranks
