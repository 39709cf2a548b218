"""Translate numbers in words from English to French and German: an encoder, attention, and a decoder with states.

    python examples/translation.py                     150 seconds of training on two CPU cores
    python examples/translation.py --try 71,1999,80000

The pairs are made by the package num2words, at random, as long as it trains. The encoder reads English words in both
directions, with `lengths=` for the rows of a batch. The decoder writes pieces of words: an LSTM over what was written
so far, whose output asks which English words matter now, and a second one over both. In training it is given the
right pieces (teacher forcing), so that a batch is one call; to translate it takes a step a piece and hands its states
on, with the likeliest piece (greedy search) or the likeliest of several beginnings (beam search).

Shapes: S English words, T pieces, B rows, K beginnings that are kept of each row, H hidden size.
"""

import argparse
import collections
import functools
import itertools
import math
import random
import re
import sys

import common
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

import rnn_gpu

LANGUAGES = {"fr": "French", "de": "German"}
SPECIAL = ["<pad>", "<start>", "<end>"]
PAD, START, END = range(3)
PIECES = 120  # that are learnt, beside the letters
LONGEST = 80  # pieces of a translation
LEARNING_RATE = 4e-3
DIGITS = 8  # of the largest numbers to train on


# ---- Data ----------------------------------------------------------------------------------------------------


class Pieces:
    """A text cut into pieces that are common in the language (byte-pair encoding, Sennrich et al. 2016).

    German writes a number as one word, and a decoder that writes letters would need five times as many steps.
    """

    def __init__(self, texts: list[str], count: int):
        """Join the commonest pair of neighbours to a piece of its own, so many times."""
        self.names = [*SPECIAL, *sorted(set("".join(texts)))]
        rows = [list(text) for text in texts]
        for _ in range(count):
            pairs = collections.Counter(pair for row in rows for pair in itertools.pairwise(row))
            if not pairs:
                break
            (first, second), _ = pairs.most_common(1)[0]
            self.names.append(first + second)
            rows = [self.join(row, first, second) for row in rows]
        self.number = {name: number for number, name in enumerate(self.names)}
        self.longest = max(map(len, self.names[len(SPECIAL) :]))

    @staticmethod
    def join(row: list[str], first: str, second: str) -> list[str]:
        """The same row with this pair as one piece."""
        joined = []
        for piece in row:
            if piece == second and joined and joined[-1] == first:
                joined[-1] = first + second
            else:
                joined.append(piece)
        return joined

    def encode(self, text: str) -> list[int]:
        """The numbers of the pieces, each the longest that fits."""
        pieces, start = [], 0
        while start < len(text):
            ends = range(min(start + self.longest, len(text)), start, -1)
            end = next(end for end in ends if text[start:end] in self.number)
            pieces.append(self.number[text[start:end]])
            start = end
        return pieces

    def text(self, pieces: list[int]) -> str:
        """What the pieces say."""
        return "".join(self.names[number] for number in pieces)


class Pairs:
    """Numbers in words: English ones with the language that is asked for in front, and pieces of that language.

    kept_away: numbers for the test, from which no piece is learnt.
    """

    def __init__(self, generator: random.Random, kept_away: set[int]):
        self.num2words = common.need("num2words").num2words
        known = " ".join(self.num2words(n, lang="en") for n in [*range(102), 10**3, 10**6])
        self.words = [*LANGUAGES, ",", *sorted(set(re.findall(r"[a-z]+", known)))]
        self.number = {word: number for number, word in enumerate(self.words)}
        drawn = [question for digits in range(1, DIGITS + 1) for question in draw(60, digits, generator)]
        sample = [self.right(*question) for question in drawn if question[0] not in kept_away]
        every_letter = [self.right(number, language) for number in [*range(21), 10**6] for language in LANGUAGES]
        self.pieces = Pieces(sample + every_letter, PIECES)

    def english(self, number: int, language: str) -> Tensor:
        """Numbers of the language's tag and the English words, int64 [S]."""
        words = re.findall(r"[a-z]+|,", self.num2words(number, lang="en"))
        return torch.tensor([self.number[word] for word in [language, *words]])

    def right(self, number: int, language: str) -> str:
        """What the translation should be."""
        return self.num2words(number, lang=language)

    def source(self, asked: list[tuple[int, str]], device: torch.device) -> tuple[Tensor, Tensor]:
        """A batch of questions: words [S, B], padded, and the lengths [B]."""
        rows = [self.english(*question) for question in asked]
        return pad_sequence(rows).to(device), torch.tensor([len(row) for row in rows], device=device)

    def target(self, asked: list[tuple[int, str]], device: torch.device) -> tuple[Tensor, Tensor]:
        """The right answers: pieces [T + 1, B] from START to END, padded, and the lengths [B] without START."""
        rows = [torch.tensor([START, *self.pieces.encode(self.right(*question)), END]) for question in asked]
        return pad_sequence(rows).to(device), torch.tensor([len(row) - 1 for row in rows], device=device)


def draw(count: int, digits: int, generator: random.Random) -> list[tuple[int, str]]:
    """Random numbers of so many digits, and a language for each."""
    smallest = 10 ** (digits - 1) if digits > 1 else 0
    numbers = [generator.randrange(smallest, 10**digits) for _ in range(count)]
    return [(number, generator.choice(list(LANGUAGES))) for number in numbers]


# ---- The model -----------------------------------------------------------------------------------------------


class Translator(nn.Module):
    """Encoder in both directions; decoder of two LSTMs, the second of which sees what the first paid attention to."""

    def __init__(self, words: int, pieces: int, hidden_size: int):
        super().__init__()
        self.words = nn.Embedding(words, hidden_size // 2)
        self.encoder = rnn_gpu.LSTM(hidden_size // 2, hidden_size // 2, bidirectional=True)
        self.pieces = nn.Embedding(pieces, hidden_size // 2)
        self.first = rnn_gpu.LSTM(hidden_size // 2, hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.second = rnn_gpu.LSTM(2 * hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, pieces)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """source [S, B] -> what the decoder attends to: memory [S, B, H], and where it is no padding, bool [S, B]."""
        memory, _ = self.encoder(self.words(source), lengths=lengths)
        return memory, torch.arange(len(source), device=source.device).unsqueeze(1) < lengths

    def decode(self, pieces: Tensor, memory: Tensor, valid: Tensor, states=(None, None), lengths=None):
        """pieces [T, B] -> logits [T, B, V] of the next, states after them, and the attention [B, T, S].

        T is the whole translation in training, and 1 with the states of the step before in a search.
        """
        asking, first = self.first(self.pieces(pieces), states[0], lengths=lengths)
        scores = torch.einsum("tbh,sbh->bts", self.query(asking), memory) / math.sqrt(memory.shape[2])
        attention = scores.masked_fill(~valid.t().unsqueeze(1), -math.inf).softmax(2)
        seen = torch.einsum("bts,sbh->tbh", attention, memory)
        output, second = self.second(torch.cat([asking, seen], 2), states[1], lengths=lengths)
        return self.head(output), (first, second), attention


@torch.no_grad()
def search(model: Translator, source: Tensor, lengths: Tensor, beam: int = 1) -> list[list[int]]:
    """The likeliest pieces of each row among `beam` beginnings that are kept at every step; 1 is greedy search."""
    memory, valid = (part.repeat_interleave(beam, dim=1) for part in model.encode(source, lengths))
    rows = source.shape[1]
    written = torch.full((1, rows * beam), START, device=source.device)  # [T, B K]
    scores = torch.full((rows, beam), -math.inf, device=source.device)  # log-probability of each beginning
    scores[:, 0] = 0.0
    first_of_row = torch.arange(rows, device=source.device).unsqueeze(1) * beam
    states = (None, None)
    for _ in range(LONGEST):
        logits, states, _ = model.decode(written[-1:], memory, valid, states)
        steps = logits[0].log_softmax(1)  # [B K, V]
        ended = written[-1] == END
        steps[ended] = -math.inf
        steps[ended, END] = 0.0  # what has ended stays as it is
        scores, best = (scores.view(-1, 1) + steps).view(rows, -1).topk(beam)  # over beginnings and pieces at once
        parents = (first_of_row + best // steps.shape[1]).flatten()
        written = torch.cat([written[:, parents], (best % steps.shape[1]).view(1, -1)])
        states = tuple(tuple(part[:, parents] for part in state) for state in states)
        if (written[-1] == END).all():
            break
    best = written[1:, first_of_row.flatten()].t().tolist()  # topk sorts: the first of each row is the likeliest
    return [row[: row.index(END)] if END in row else row for row in best]


def exact(model: Translator, pairs: Pairs, asked: list[tuple[int, str]], device: torch.device, beam: int) -> float:
    """The part of the questions whose answer is right to the last letter."""
    right = 0
    for start in range(0, len(asked), 250):
        batch = asked[start : start + 250]
        answers = search(model, *pairs.source(batch, device), beam)
        right += sum(
            pairs.pieces.text(answer) == pairs.right(*question) for answer, question in zip(answers, batch, strict=True)
        )
    return right / len(asked)


# ---- The command ---------------------------------------------------------------------------------------------


def draw_attention(model: Translator, pairs: Pairs, question: tuple[int, str], options) -> None:
    """A picture: which English words the decoder looked at for each piece."""
    pieces, _ = pairs.target([question], options.device)
    with torch.no_grad():
        attention = model.decode(pieces[:-1], *model.encode(*pairs.source([question], options.device)))[2][0]
    picture = common.figure(11, 4.2)
    axes = picture.subplots()
    axes.imshow(attention.t().cpu(), cmap="Greys", aspect="auto")
    axes.set_xticks(range(len(pieces) - 1), [pairs.pieces.names[n] for n in pieces[1:, 0].tolist()], rotation=40)
    axes.set_yticks(range(attention.shape[1]), [pairs.words[n] for n in pairs.english(*question)])
    axes.set_title(f"{question[0]:,}: what the decoder looked at before each piece")
    common.save(picture, options)


def numbers(text: str) -> list[int]:
    """Numbers of the command line, for all of which there are words."""
    numbers = [int(number) for number in text.split(",")]
    if any(not 0 <= number < 10 ** (DIGITS + 1) for number in numbers):
        raise argparse.ArgumentTypeError(f"0 to {10 ** (DIGITS + 1) - 1:,}, got {text}")
    return numbers


def main() -> int:
    """Run what the command line asks for; the exit status."""
    parser = common.parser(__doc__, seconds=150)
    parser.add_argument("--hidden-size", type=int, default=128, help="of the decoder; of both directions together")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs in a training step")
    parser.add_argument("--beam", type=int, default=4, help="beginnings that the beam search keeps")
    parser.add_argument(
        "--try",
        dest="tried",
        type=numbers,
        default="0,71,1999,1000021",
        help="numbers to show the translations of",
    )
    options = common.read_options(parser)
    if options.quick:
        options.hidden_size, options.batch_size = 16, 8

    generator = random.Random(options.seed)
    count = 20 if options.quick else 200  # of each number of digits
    unseen = [question for digits in range(3, DIGITS + 1) for question in draw(count, digits, generator)]
    longer = draw(count, DIGITS + 1, generator)
    kept_away = {number for number, _ in unseen}
    pairs = Pairs(generator, kept_away)

    model = Translator(len(pairs.words), len(pairs.pieces.names), options.hidden_size).to(options.device)
    optimizer = torch.optim.Adam(model.parameters())
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, on {options.device}")
    loss = torch.tensor(math.nan)

    def batch() -> tuple[Tensor, ...]:
        """English words and their lengths, and the right pieces and theirs."""
        (digits,) = generator.choices(range(1, DIGITS + 1), range(1, DIGITS + 1))  # longer ones more often
        asked = draw(options.batch_size, digits, generator)
        asked = [question for question in asked if question[0] not in kept_away] or [(0, "fr")]
        return *pairs.source(asked, options.device), *pairs.target(asked, options.device)

    def step(words: Tensor, word_counts: Tensor, pieces: Tensor, lengths: Tensor, rate: float = 0.0) -> None:
        nonlocal loss
        memory, valid = model.encode(words, word_counts)
        logits, _, _ = model.decode(pieces[:-1], memory, valid, lengths=lengths)
        loss = functional.cross_entropy(logits.flatten(0, 1), pieces[1:].flatten(), ignore_index=PAD)
        common.update(optimizer, loss, rate * LEARNING_RATE)

    for passed in common.budget(options.seconds, lambda: f"{loss.item():.4f} nats a piece"):
        step(*batch(), common.schedule(passed))

    tried = [(number, language) for number in options.tried for language in LANGUAGES]
    for (number, language), answer in zip(tried, search(model, *pairs.source(tried, options.device)), strict=True):
        print(f"  {number:>12,}  {LANGUAGES[language]:7s} {pairs.pieces.text(answer)}")
    reached = {}
    for name, asked in (
        (f"up to {DIGITS} digits, unseen", unseen),
        (f"{DIGITS + 1} digits, longer than any in training", longer),
    ):
        for search_name, beam in (("greedy", 1), (f"beam of {options.beam}", options.beam)):
            reached[name, beam] = exact(model, pairs, asked, options.device, beam)
            print(f"{name}, {search_name}: {reached[name, beam]:.1%} of {len(asked)} right to the last letter")
    draw_attention(model, pairs, (2_345_678, "de"), options)
    common.compare_speed(options, functools.partial(step, *batch()))
    least = next(iter(reached.values()))
    return common.verdict(options, translation=(f"{least:.1%} of unseen numbers, at least 95 %", least >= 0.95))


if __name__ == "__main__":
    sys.exit(main())
