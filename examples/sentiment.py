"""How much people liked a film, from one sentence of a review: a GRU against a bag of words.

    python examples/sentiment.py                 30 seconds of training on two CPU cores

The data are 10,605 snippets of reviews, each rated by twenty people from -4 to 4 (Hutto and Gilbert 2014, VADER).
They are in the source archive of the package vaderSentiment 2.5, which pip fetches at the first run. A bag of words
gives every word a rating and adds them up. The GRU starts from the same ratings, in its embedding, and also sees the
order. What else it shows: padded batches with `lengths=` against packed ones, the last states against the mean of
all, and, in the picture, what each word did to the rating of the words before it.

Shapes: T words of the longest snippet of a batch, B snippets, H hidden size, V words in the vocabulary.
"""

import argparse
import collections
import io
import math
import random
import re
import sys
import tarfile
from collections.abc import Callable, Iterator

import common
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import rnn_gpu

DATA = "vaderSentiment==2.5", "hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
LEAST_COUNT = 2  # in training; rarer words are one word, number 1; 0 is padding
PENALTIES = 3.0, 10.0, 30.0  # of the bag of words, the best one chosen on the validation snippets
TRIED = (  # sentences whose words the picture weighs
    "a charming film, funny and never dull",
    "not funny, not charming, and far too long",
    "it begins as a fine thriller, but the ending is a mess",
    "it begins as a mess, but the ending is a fine thriller",
)
LEARNING_RATE = 2e-3
BATCH_SIZE = 64


# ---- Data ----------------------------------------------------------------------------------------------------


def read_snippets() -> list[tuple[list[str], float]]:
    """Words and mean rating of every snippet."""
    with tarfile.open(common.fetch(DATA[0], *common.SOURCE)) as archive:
        (inner,) = (member for member in archive if member.name.endswith(DATA[1]))
        with tarfile.open(fileobj=io.BytesIO(archive.extractfile(inner).read())) as data:
            lines = data.extractfile(DATA[2]).read().decode("utf-8").splitlines()
    rows = [line.split("\t", 2) for line in lines]
    return [(split(text), float(rating)) for _, rating, text in rows]


def split(text: str) -> list[str]:
    """The words and signs of a text."""
    return re.findall(r"[a-z]+(?:n't)?|'[a-z]+|[!?.,:;]", text.lower())


class Snippets:
    """Encoded snippets with their ratings, on a device."""

    def __init__(self, rows: list[tuple[list[str], float]], index: dict[str, int], device: torch.device):
        self.texts = [words for words, _ in rows]
        self.words = [torch.tensor([index.get(word, 1) for word in words] or [1], device=device) for words, _ in rows]
        self.lengths = torch.tensor([len(words) for words in self.words], device=device)
        self.ratings = torch.tensor([rating for _, rating in rows], device=device)

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Words [T, B], padded; lengths [B] and ratings [B]."""
        return pad_sequence([self.words[row] for row in rows]), self.lengths[rows], self.ratings[rows]


def accuracy(predictions: Tensor, ratings: Tensor) -> float:
    """How often a prediction has the sign of the rating."""
    return ((predictions > 0) == (ratings > 0)).float().mean().item()


def correlation(predictions: Tensor, ratings: Tensor) -> float:
    """Pearson's, between predictions and ratings."""
    return torch.corrcoef(torch.stack([predictions, ratings]))[0, 1].item()


# ---- The models ----------------------------------------------------------------------------------------------


class BagOfWords(nn.Module):
    """A rating for every word, and their sum: a linear regression on which words there are, whatever their order."""

    def __init__(self, words: int):
        super().__init__()
        self.ratings = nn.EmbeddingBag(words, 1, mode="sum", padding_idx=0)
        self.bias = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.ratings.weight)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """words [T, B], padded -> ratings [B]."""
        return self.bias + self.ratings(words.t()).squeeze(1)

    def fit(self, snippets: Snippets, penalty: float) -> "BagOfWords":
        """The regression's optimum, with a penalty on the squares of the words' ratings."""
        words, lengths, ratings = snippets.batch(list(range(len(snippets.words))))
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=60, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            error = (self(words, lengths) - ratings).pow(2).sum() + penalty * self.ratings.weight.pow(2).sum()
            error.backward()
            return error

        optimizer.step(loss)
        return self


class Rater(nn.Module):
    """Embedding, GRU in both directions, and the rating by the mean of its outputs or by its last states."""

    def __init__(self, bag: BagOfWords, hidden_size: int, pooling: str, dropout: float = 0.5):
        super().__init__()
        self.pooling = pooling
        self.embedding = nn.Embedding(bag.ratings.num_embeddings, hidden_size)
        nn.init.normal_(self.embedding.weight, std=0.3)
        with torch.no_grad():  # the bag's ratings in some of the columns, because dropout takes half of them away
            self.embedding.weight[:, :4] = bag.ratings.weight.cpu() * torch.tensor([1.5, -1.5, 1.5, -1.5])
        self.dropout = nn.Dropout(dropout)
        self.gru = rnn_gpu.GRU(hidden_size, hidden_size, bidirectional=True)
        self.head = nn.Linear(2 * hidden_size, 1)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """words [T, B], padded -> ratings [B]."""
        output, h_n = self.gru(self.dropout(self.embedding(words)), lengths=lengths)
        if self.pooling == "last":
            pooled = torch.cat([h_n[0], h_n[1]], 1)  # the state after the last word, and, backwards, after the first
        else:
            pooled = output.sum(0) / lengths.unsqueeze(1)  # outputs past a row's end are zero
        return self.head(self.dropout(pooled)).squeeze(1)

    @torch.no_grad()
    def added(self, words: Tensor) -> Tensor:
        """By how much each word of a snippet [T] moves the rating of what stands before it, at first the bias: [T]."""
        lengths = torch.arange(1, len(words) + 1, device=words.device)  # every beginning is a row of one batch
        ratings = self(words.unsqueeze(1).expand(-1, len(words)), lengths)
        return ratings.diff(prepend=self.head.bias)


@torch.no_grad()
def rate(model: nn.Module, snippets: Snippets) -> Tensor:
    """The model's rating of every snippet [N]."""
    model.eval()
    rows = torch.arange(len(snippets.words)).split(256)
    rated = torch.cat([model(*snippets.batch(part.tolist())[:2]) for part in rows])
    model.train()
    return rated


def batches(snippets: Snippets) -> Iterator[list[int]]:
    """Rows of the snippets, every one once, those of a batch of similar lengths, so that there is little padding."""
    for part in torch.randperm(len(snippets.words)).split(20 * BATCH_SIZE):
        by_length = part[snippets.lengths.cpu()[part].argsort()].split(BATCH_SIZE)
        for number in torch.randperm(len(by_length)).tolist():
            yield by_length[number].tolist()


def train(model: Rater, snippets: Snippets, seconds: float) -> Callable:
    """Least squares, for so many seconds; the function that makes one step."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    remaining, loss = iter(()), torch.tensor(math.nan)

    def step(rate: float = 0.0) -> None:
        nonlocal remaining, loss
        rows = next(remaining, None)
        if rows is None:
            remaining = batches(snippets)
            rows = next(remaining)
        words, lengths, ratings = snippets.batch(rows)
        loss = (model(words, lengths) - ratings).pow(2).mean()
        common.update(optimizer, loss, rate * LEARNING_RATE)

    for passed in common.budget(seconds, lambda: f"mean square error {loss.item():.3f}"):
        step(common.schedule(passed))
    return step


# ---- The command ---------------------------------------------------------------------------------------------


@torch.no_grad()
def compare_with_packed(layer: rnn_gpu.GRU, embedded: Tensor, lengths: Tensor) -> float:
    """Largest difference between a padded batch with `lengths=` and the same batch packed; prints the times of both."""

    def padded() -> Tensor:
        return layer(embedded, lengths=lengths)[0]

    def packed() -> Tensor:
        return pad_packed_sequence(layer(pack_padded_sequence(embedded, lengths.cpu(), enforce_sorted=False))[0])[0]

    times = [common.milliseconds(embedded.device, call) for call in (padded, packed)]
    print("a batch with lengths= takes {:.1f} ms, packed and padded again {:.1f} ms".format(*times))
    return (padded() - packed()).abs().max().item()


def draw_words(model: Rater, bag: BagOfWords, sentences: Snippets, options: argparse.Namespace) -> None:
    """The picture: by how much each word of some sentences moved the rating of the words before it."""
    picture = common.figure(9, 1.7 * len(sentences.texts))
    every = zip(
        picture.subplots(len(sentences.texts), squeeze=False)[:, 0], sentences.texts, sentences.words, strict=True
    )
    for (axes, text, words), by_bag in zip(every, rate(bag, sentences), strict=True):
        added = model.added(words).cpu()
        axes.bar(range(len(added)), added, color=["tab:green" if change > 0 else "tab:red" for change in added])
        axes.set_xticks(range(len(added)), text)
        rating = added.sum() + model.head.bias.item()
        axes.set_title(f"GRU {rating:+.1f}, bag of words {by_bag:+.1f}", fontsize=9)
        axes.axhline(0.0, color="black", linewidth=0.6)
    common.save(picture, options)


def main() -> int:
    """Run what the command line asks for; the exit status."""
    parser = common.parser(__doc__, seconds=30)
    parser.add_argument("--hidden-size", type=int, default=32, help="units of the layer, and size of the embedding")
    options = common.read_options(parser)
    rows = read_snippets()
    random.Random(options.seed).shuffle(rows)
    if options.quick:
        options.hidden_size, rows = 8, rows[:500]

    first, second = len(rows) * 15 // 100, len(rows) * 25 // 100
    counts = collections.Counter(word for words, _ in rows[second:] for word in words)
    frequent = [word for word, count in counts.most_common() if count >= LEAST_COUNT]
    index = {word: number for number, word in enumerate(frequent, 2)}
    parts = rows[:first], rows[first:second], rows[second:]
    test, validation, training = (Snippets(part, index, options.device) for part in parts)
    print(f"{len(training.words)} snippets to train on, {len(test.words)} to test; {len(index):,} words")

    bags = [BagOfWords(len(index) + 2).to(options.device).fit(training, penalty) for penalty in PENALTIES]
    bag = max(bags, key=lambda bag: correlation(rate(bag, validation), validation.ratings))
    results, models = {"bag of words": rate(bag, test)}, {}
    for pooling in ("last", "mean"):
        models[pooling] = Rater(bag, options.hidden_size, pooling).to(options.device)
        step = train(models[pooling], training, options.seconds / 2)
        results[f"GRU, {pooling}"] = rate(models[pooling], test)
    print(f"\n{'on the test snippets':20s} correlation with people   right sign")
    for name, ratings in results.items():
        print(f"{name:20s} {correlation(ratings, test.ratings):23.3f} {accuracy(ratings, test.ratings):12.1%}")

    model = models["mean"].eval()
    words, lengths, _ = test.batch(list(range(64)))
    difference = compare_with_packed(model.gru, model.embedding(words), lengths)
    draw_words(model, bag, Snippets([(split(text), 0.0) for text in TRIED], index, options.device), options)
    model.train()
    common.compare_speed(options, step)
    ours, theirs = (correlation(results[name], test.ratings) for name in ("GRU, mean", "bag of words"))
    return common.verdict(
        options,
        ratings=(f"correlation with people's {ours:.3f}, the bag of words {theirs:.3f}", ours > theirs),
        lengths=(f"padded and packed differ by {difference:.1e}, at most 1e-2", difference <= 1e-2),
    )


if __name__ == "__main__":
    sys.exit(main())
