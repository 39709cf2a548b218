"""A word language model on the docstrings and comments of Python's standard library, against an n-gram model.

    python examples/word_language_model.py                       100 seconds of training on two CPU cores
    python examples/word_language_model.py --device cuda --hidden-size 512 --seconds 300

What it shows: the text is cut into streams that are read side by side, and the state is carried from segment to
segment (truncated back-propagation through time); dropout between the layers; one matrix that is both the embedding
and the weights of the softmax; perplexity on files that were never seen, beside that of an interpolated Kneser-Ney
trigram model on the same words; and text that the model writes, with a temperature, from its k likeliest words.

Shapes: T words of a segment, B streams, S length of a stream, E size of an embedding, V words in the vocabulary.
"""

import argparse
import ast
import collections
import math
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import common
import torch
from torch import Tensor, nn
from torch.nn import functional

import rnn_gpu

SKIPPED = re.compile(r"(^|/)(test|idlelib|lib2to3|turtledemo|encodings|pydoc_data|ensurepip|site-packages|config-)")
COMMENTS = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)  # lines that are nothing else, one below the other
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|([^\w\s])\1*")  # a run of one sign is one word
UNKNOWN, END = "<unknown>", "<end>"  # END closes a docstring or a comment

LEARNING_RATE = 5e-3


# ---- The text ------------------------------------------------------------------------------------------------


def read_words(path: Path) -> list[str]:
    """The words of a file's docstrings and of its blocks of comments, each piece closed by END."""
    source = path.read_text(encoding="utf-8")
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    pieces = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    pieces += [re.sub(r"^\s*#+", " ", block.group(), flags=re.MULTILINE) for block in COMMENTS.finditer(source)]
    words = []
    for piece in filter(None, pieces):
        words += [match.group() for match in WORD.finditer(piece.lower())] + [END]
    return words


def read_library(quick: bool) -> tuple[list[str], list[str]]:
    """Words to train on, and those of every tenth file, which are never trained on."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(library.rglob("*.py")) if not SKIPPED.search(str(path.relative_to(library)))]
    if quick:
        paths = paths[:20]
    files = [read_words(path) for path in paths]
    unseen = [word for file in files[5::10] for word in file]
    del files[5::10]
    return [word for file in files for word in file], unseen


class Vocabulary:
    """The commonest words of the training text, by number; 0 is UNKNOWN, which stands for all others."""

    def __init__(self, words: list[str], size: int):
        counts = collections.Counter(words)
        self.words = [UNKNOWN, *(word for word, _ in counts.most_common(size - 1))]
        self.index = {word: number for number, word in enumerate(self.words)}

    def encode(self, words: list[str]) -> Tensor:
        """The number of each word, int64 [N]."""
        return torch.tensor([self.index.get(word, 0) for word in words])


def segments(streams: Tensor, sequence_length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of input and target [T, B], the target one word ahead, in the order of the text."""
    for start in range(0, len(streams) - 1, sequence_length):
        window = streams[start : start + sequence_length + 1]
        yield window[:-1], window[1:]


# ---- The model -----------------------------------------------------------------------------------------------


class WordModel(nn.Module):
    """Embedding, LSTM with dropout between its layers, and a softmax whose weights are the embedding's.

    Two things make it learn in minutes: the head sees the last word's embedding beside the LSTM's output, so that pairs
    of words need not go through the layers; and its bias starts as the log-frequency of the words.
    """

    def __init__(self, frequencies: Tensor, hidden_size: int, layers: int, dropout: float):
        super().__init__()
        words = len(frequencies)
        self.embedding = nn.Embedding(words, hidden_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.dropout = nn.Dropout(dropout)
        self.lstm = rnn_gpu.LSTM(hidden_size, hidden_size, num_layers=layers, dropout=dropout)
        self.mix = nn.Linear(2 * hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, words)
        self.head.weight = self.embedding.weight  # tied
        self.head.bias = nn.Parameter(frequencies.log())

    def forward(self, words: Tensor, state=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """words [T, B] -> logits [T, B, V] of the word after each, and the last state."""
        embedded = self.dropout(self.embedding(words))
        output, state = self.lstm(embedded, state)
        return self.head(self.mix(torch.cat([self.dropout(output), embedded], 2))), state


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean of -log p of the targets [T, B]."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def perplexity(model: WordModel, streams: Tensor, sequence_length: int) -> float:
    """Of the model on all of the streams [S, B], with the state carried along them."""
    model.eval()
    total, state = 0.0, None
    for inputs, targets in segments(streams, sequence_length):
        logits, state = model(inputs, state)
        total += cross_entropy(logits, targets).item() * targets.numel()
    model.train()
    return math.exp(total / (streams.numel() - streams.shape[1]))


@torch.no_grad()
def write(model: WordModel, vocabulary: Vocabulary, start: str, length: int, temperature: float, top_k: int) -> str:
    """Text after `start`, each word drawn from the `top_k` likeliest; a temperature below 1 sharpens the draw."""
    model.eval()
    text, state = start.split(), None
    following = vocabulary.encode(text).to(model.head.bias.device).unsqueeze(1)  # [T, 1]
    for _ in range(length):
        logits, state = model(following, state)
        logits[..., 0] = -math.inf  # UNKNOWN is no word
        likeliest, numbers = logits[-1].topk(top_k)  # [1, k]
        following = numbers.gather(1, torch.multinomial((likeliest / temperature).softmax(1), 1))
        text.append(vocabulary.words[following.item()])
    return re.sub(r" ([.,:;)\]]+)(?= |$)", r"\1", re.sub(r"([(\[]) ", r"\1", " ".join(text).replace(END, "\n   ")))


# ---- Training ------------------------------------------------------------------------------------------------


def train(model: WordModel, streams: Tensor, options: argparse.Namespace):
    """Truncated back-propagation through time, for the budget; the function that makes one step."""
    optimizer = torch.optim.Adam(model.parameters())
    remaining, state, loss = iter(()), None, torch.tensor(math.nan)

    def step(rate: float = 0.0) -> None:
        nonlocal remaining, state, loss
        segment = next(remaining, None)
        if segment is None:  # the streams have ended: again from their start, with no past
            remaining, state = segments(streams, options.sequence_length), None
            segment = next(remaining)
        logits, after = model(segment[0], state)
        state = tuple(part.detach() for part in after)
        loss = cross_entropy(logits, segment[1])
        common.update(optimizer, loss, rate * LEARNING_RATE, clip=0.5)

    for passed in common.budget(options.seconds, lambda: f"perplexity {math.exp(loss.item()):.0f}"):
        step(common.schedule(passed))
    return step


def main() -> int:
    """Run what the command line asks for; the exit status."""
    parser = common.parser(__doc__, seconds=100, picture=False)
    parser.add_argument("--words", type=int, default=2000, help="in the vocabulary, of both models")
    parser.add_argument("--hidden-size", type=int, default=128, help="of the layers and the embedding")
    parser.add_argument("--layers", type=int, default=2, help="recurrent layers")
    parser.add_argument("--dropout", type=float, default=0.05, help="of embeddings, outputs, and between layers")
    parser.add_argument("--batch-size", type=int, default=32, help="streams of text read side by side")
    parser.add_argument("--sequence-length", type=int, default=32, help="words of a stream in a training step")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the text that it writes")
    parser.add_argument("--top-k", type=int, default=40, help="words of which each is drawn")
    options = common.read_options(parser)
    if options.quick:
        options.hidden_size, options.batch_size = 16, 4

    text, unseen_text = read_library(options.quick)
    vocabulary = Vocabulary(text, options.words)
    training, unseen = vocabulary.encode(text), vocabulary.encode(unseen_text)
    print(f"text: {len(training):,} words to train on, {len(unseen):,} unseen, {len(vocabulary.words):,} different")
    baseline = common.KneserNey(training.tolist(), len(vocabulary.words)).perplexity(unseen.tolist())
    print(f"Kneser-Ney trigrams: perplexity {baseline:.1f} on unseen files")

    counts = torch.bincount(training, minlength=len(vocabulary.words)) + 1.0
    model = WordModel(counts / counts.sum(), options.hidden_size, options.layers, options.dropout).to(options.device)
    print(f"model: {model.lstm}, {sum(p.numel() for p in model.parameters()):,} parameters, on {options.device}")
    streams = common.side_by_side(training, options.batch_size).to(options.device)
    step = train(model, streams, options)
    reached = perplexity(model, common.side_by_side(unseen, 8).to(options.device), options.sequence_length)

    print(f"\nA sample:\n\n    {write(model, vocabulary, 'returns the', 60, options.temperature, options.top_k)}")
    model.train()
    common.compare_speed(options, step)
    words = f"{reached:.1f} on unseen files, trigrams {baseline:.1f}"
    return common.verdict(options, perplexity=(words, reached < baseline))


if __name__ == "__main__":
    sys.exit(main())
