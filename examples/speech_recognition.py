"""Recognise spoken digits by connectionist temporal classification, and who of nine people speaks.

    python examples/speech_recognition.py               200 seconds of training on two CPU cores

Digits: sequences of one to six, spoken by the synthesiser eSpeak NG (from the package espeakng-loader) in several
voices, speeds and pitches, with noise. Two layers in both directions read the log-mel spectrogram; the utterances of
a batch are of all lengths, and go through the layers as packed rows. The labels say which digits, not when: the CTC
loss (Graves et al. 2006) finds that out, and the picture shows it.

Speakers: real voices, nine Japanese men saying /ae/ (Kudo, Toyama and Shimbo 1999), 12 cepstral coefficients a frame,
inside the wheel of the package aeon, which pip fetches at the first run.

Shapes: S samples of a waveform, T frames of the longest utterance of a batch, B utterances, M mel bands, H hidden
size.
"""

import argparse
import ctypes
import functools
import math
import random
import sys

import common
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence, unpad_sequence

import rnn_gpu

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
BLANK = len(WORDS)
VOICES = ["en-us", "en-us+f2", "en-us+m3", "en-us+f4", "en", "en+m1", "en+f3", "en-gb-scotland+m7", "en-029+m2"]
UNHEARD = ["en-us+m5", "en+f5", "en-gb-x-rp+m4"]  # voices of the second test
SAMPLE_RATE, WINDOW, HOP, BANDS = 22050, 512, 256, 32  # a frame of 23 ms every 12 ms
QUIETEST, LOUDEST = 5.0, 25.0  # signal above noise, in dB, in training
LEARNING_RATE = 4e-3
SPEAKERS = "aeon==1.6.0", "aeon/datasets/data/JapaneseVowels/JapaneseVowels_{}.ts"


# ---- Speech --------------------------------------------------------------------------------------------------


class Synthesiser:
    """eSpeak NG, whose C library the package brings."""

    SYNCHRONOUS, RATE, PITCH, UTF8 = 2, 1, 3, 1  # of speak_lib.h

    def __init__(self):
        loader = common.need("espeakng_loader")
        self.library, self.chunks = ctypes.CDLL(loader.get_library_path()), []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = callback(self.receive)  # kept here, because C holds no reference
        rate = self.library.espeak_Initialize(self.SYNCHRONOUS, 0, loader.get_data_path().encode(), 0)
        assert rate == SAMPLE_RATE, f"eSpeak NG could not start, or gives {rate} samples a second"
        self.library.espeak_SetSynthCallback(self.callback)

    def receive(self, samples, count: int, events) -> int:
        """Called by the library with a piece of the waveform."""
        if samples and count > 0:
            self.chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def say(self, digits: list[int], voice: str, words_a_minute: int, pitch: int) -> Tensor:
        """The waveform of these digits [S], of unit power."""
        self.chunks.clear()
        text = " ".join(WORDS[digit] for digit in digits).encode()
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"eSpeak NG has no voice {voice}")
        self.library.espeak_SetParameter(self.RATE, words_a_minute, 0)
        self.library.espeak_SetParameter(self.PITCH, pitch, 0)
        self.library.espeak_Synth(text, len(text) + 1, 0, 0, 0, self.UTF8, None, None)
        wave = torch.frombuffer(bytearray(b"".join(self.chunks)), dtype=torch.int16).float()
        return wave / wave.pow(2).mean().sqrt()


def utterances(
    count: int,
    voices: list[str],
    generator: random.Random,
    shortest: int = 1,
    heard: set[tuple[int, ...]] = frozenset(),
) -> list[tuple[Tensor, Tensor]]:
    """Waveforms [S] and digits [labels] that are not among those heard, each of a random voice, speed and pitch."""
    synthesiser, spoken = Synthesiser(), []
    while len(spoken) < count:
        digits = [generator.randrange(10) for _ in range(generator.randint(shortest, 6))]
        if tuple(digits) in heard:
            continue
        how = generator.choice(voices), generator.randint(130, 230), generator.randint(30, 70)
        spoken.append((synthesiser.say(digits, *how), torch.tensor(digits)))
    return spoken


@functools.cache
def mel_bands(device: torch.device) -> Tensor:
    """Triangular filters, evenly spaced on the mel scale, 2595 log10(1 + f / 700): [M, WINDOW / 2 + 1]."""
    highest = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, highest, BANDS + 2) / 2595) - 1)
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0).to(device)


def log_mel(wave: Tensor, above_noise: float) -> Tensor:
    """Features of a waveform [S] with white noise so many dB below it: pairs of frames side by side, [T, 2 M]."""
    noisy = wave + torch.randn_like(wave) * 10 ** (-above_noise / 20)
    window = torch.hann_window(WINDOW, device=wave.device)
    power = torch.stft(noisy, WINDOW, HOP, window=window, return_complex=True).abs().pow(2)
    features = (mel_bands(wave.device) @ power + 1e-3).log().t()  # [frames, M]
    features = (features - features.mean()) / features.std()
    return features[: len(features) // 2 * 2].reshape(-1, 2 * BANDS)


# ---- Digits --------------------------------------------------------------------------------------------------


class Recogniser(nn.Module):
    """Two layers in both directions, and for every frame the log-probabilities of the digits and the blank."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.lstm = rnn_gpu.LSTM(2 * BANDS, hidden_size, num_layers=2, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(2 * hidden_size, len(WORDS) + 1)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """features [T_b, 2 M] of each utterance -> log-probabilities [T, B, labels], lengths [B] on the CPU."""
        packed, _ = self.lstm(pack_sequence(features, enforce_sorted=False))
        output, lengths = pad_packed_sequence(packed)
        return self.head(output).log_softmax(2), lengths


def read_off(log_probabilities: Tensor) -> list[int]:
    """The likeliest label of each frame [T, labels], repetitions taken as one, blanks left out."""
    labels = torch.unique_consecutive(log_probabilities.argmax(1))
    return labels[labels != BLANK].tolist()


def edits(found: list[int], right: list[int]) -> int:
    """The least number of digits put in, left out and changed between the two (Levenshtein 1966)."""
    row = list(range(len(right) + 1))
    for i, digit in enumerate(found, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(right, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (digit != other))
    return row[-1]


@torch.no_grad()
def digit_error_rate(model: Recogniser, spoken: list[tuple[Tensor, Tensor]], device, above_noise: float) -> float:
    """Edits for every digit that was spoken."""
    model.eval()
    wrong = 0
    for start in range(0, len(spoken), 50):
        batch = spoken[start : start + 50]
        rows = unpad_sequence(*model([log_mel(wave.to(device), above_noise) for wave, _ in batch]))
        wrong += sum(edits(read_off(row), right.tolist()) for row, (_, right) in zip(rows, batch, strict=True))
    model.train()
    return wrong / sum(len(right) for _, right in spoken)


def train_digits(spoken: list[tuple[Tensor, Tensor]], options: argparse.Namespace):
    """A trained recogniser, and the function that makes one step with a batch of its own."""
    model = Recogniser(options.hidden_size).to(options.device)
    optimizer = torch.optim.Adam(model.parameters())
    generator, loss = random.Random(options.seed), torch.tensor(math.nan)
    print(f"model: {model.lstm}, {sum(p.numel() for p in model.parameters()):,} parameters, on {options.device}")

    def batch() -> tuple[list[Tensor], Tensor, Tensor]:
        """Features of random utterances; their labels, all in a row, and how many each has."""
        drawn = generator.sample(spoken, options.batch_size)
        features = [log_mel(wave.to(options.device), generator.uniform(QUIETEST, LOUDEST)) for wave, _ in drawn]
        labels, counts = torch.cat([right for _, right in drawn]), torch.tensor([len(right) for _, right in drawn])
        return features, labels.to(options.device), counts

    def step(features: list[Tensor], labels: Tensor, counts: Tensor, rate: float = 0.0) -> None:
        nonlocal loss
        log_probabilities, lengths = model(features)
        loss = functional.ctc_loss(log_probabilities, labels, lengths, counts, blank=BLANK)
        common.update(optimizer, loss, rate * LEARNING_RATE)

    for passed in common.budget(options.seconds, lambda: f"CTC loss {loss.item():.3f}"):
        step(*batch(), common.schedule(passed))
    return model, functools.partial(step, *batch())


@torch.no_grad()
def draw(model: Recogniser, wave: Tensor, right: Tensor, options: argparse.Namespace) -> None:
    """The picture: a spectrogram, and under it what the model said, and when."""
    model.eval()
    features = log_mel(wave.to(options.device), above_noise=15.0)
    log_probabilities = model([features])[0][:, 0].cpu()
    picture = common.figure(9, 4.2)
    above, below = picture.subplots(2, sharex=True)
    seconds = [0, len(features) * 2 * HOP / SAMPLE_RATE]
    above.imshow(features.cpu().reshape(-1, BANDS).t(), origin="lower", aspect="auto", extent=[*seconds, 0, BANDS])
    above.set(ylabel="mel band", title="spoken: " + " ".join(map(str, right.tolist())))
    times = torch.linspace(*seconds, len(log_probabilities))
    below.plot(times, log_probabilities[:, :BLANK].exp())
    labels, frames = torch.unique_consecutive(log_probabilities.argmax(1), return_counts=True)
    for label, end, count in zip(labels.tolist(), frames.cumsum(0).tolist(), frames.tolist(), strict=True):
        if label != BLANK:
            below.text(times[end - (count + 1) // 2], 1.03, str(label), ha="center")
    below.set(ylabel="probability", xlabel="seconds", ylim=(0, 1.2))
    found = " ".join(map(str, read_off(log_probabilities)))
    below.set_title(f"read off: {found}", fontsize=10)
    common.save(picture, options)
    model.train()


# ---- Speakers ------------------------------------------------------------------------------------------------


def read_speakers(part: str) -> tuple[list[Tensor], Tensor]:
    """Utterances [T_b, 12] of the part "TRAIN" or "TEST", and who said each, 0 to 8."""
    lines = common.read_wheel(SPEAKERS[0], SPEAKERS[1].format(part)).partition("@data\n")[2].split()
    rows = [line.split(":") for line in lines]
    spoken = [torch.tensor([[float(x) for x in channel.split(",")] for channel in row[:-1]]).t() for row in rows]
    return spoken, torch.tensor([int(row[-1]) - 1 for row in rows])


def recognise_speakers(training: tuple[list[Tensor], Tensor], test: tuple[list[Tensor], Tensor], options) -> float:
    """Train on 270 utterances; the part of 370 others whose speaker is found."""
    (spoken, speakers), (unheard, truth) = training, test
    frames = torch.cat(spoken)

    def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Frames of unit size [T, B, 12], and the lengths [B]."""
        scaled = pad_sequence([(row - frames.mean(0)) / frames.std(0) for row in rows])
        return scaled.to(options.device), torch.tensor([len(row) for row in rows], device=options.device)

    (inputs, lengths), targets = padded(spoken), speakers.to(options.device)
    layer = rnn_gpu.GRU(12, options.hidden_size, bidirectional=True).to(options.device)
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(2 * options.hidden_size, 9)).to(options.device)
    optimizer = torch.optim.AdamW([*layer.parameters(), *head.parameters()], weight_decay=0.05)
    loss = torch.tensor(math.nan)

    def scores(rows: Tensor, counts: Tensor) -> Tensor:
        """Of every speaker, from the mean of the outputs, which are zero past a row's end: [B, 9]."""
        return head(layer(rows, lengths=counts)[0].sum(0) / counts.unsqueeze(1))

    def step(rate: float) -> None:
        nonlocal loss
        noisy = inputs + 0.3 * torch.randn_like(inputs)
        loss = functional.cross_entropy(scores(noisy, lengths), targets, label_smoothing=0.1)
        common.update(optimizer, loss, rate * LEARNING_RATE)

    for passed in common.budget(options.seconds / 10, lambda: f"cross entropy {loss.item():.3f}"):
        step(common.schedule(passed))
    head.eval()
    with torch.no_grad():
        return (scores(*padded(unheard)).argmax(1).cpu() == truth).float().mean().item()


def main() -> int:
    """Run what the command line asks for; the exit status."""
    parser = common.parser(__doc__, seconds=200)
    parser.add_argument("--hidden-size", type=int, default=64, help="units of a layer and direction")
    parser.add_argument("--batch-size", type=int, default=32, help="utterances in a training step")
    parser.add_argument("--utterances", type=int, default=2000, help="to train on")
    options = common.read_options(parser)
    if options.quick:
        options.hidden_size, options.batch_size, options.utterances = 8, 4, 20

    people = read_speakers("TRAIN"), read_speakers("TEST")
    generator = random.Random(options.seed)
    spoken = utterances(options.utterances, VOICES, generator)
    heard = {tuple(digits.tolist()) for _, digits in spoken}
    tests = {  # of three digits at least, because most of the shorter ones have been heard
        "new sequences": utterances(options.utterances // 10, VOICES, generator, 3, heard),
        "new sequences and voices": utterances(options.utterances // 10, UNHEARD, generator, 3, heard),
    }
    hours = sum(len(wave) for wave, _ in spoken) / SAMPLE_RATE / 3600
    print(f"{len(spoken)} utterances, {hours:.2f} hours, {len(VOICES)} voices")
    model, step = train_digits(spoken, options)
    rates = {}
    for name, test in tests.items():
        for above_noise in (20.0, 10.0):
            rates[name, above_noise] = digit_error_rate(model, test, options.device, above_noise)
            print(f"{name}, noise {above_noise:.0f} dB below: {rates[name, above_noise]:.2%} of digits wrong")
    draw(model, *max(tests["new sequences"], key=lambda pair: len(pair[1])), options)
    speakers = recognise_speakers(*people, options)
    print(f"speakers: {speakers:.1%} of 370 utterances")
    common.compare_speed(options, step)
    worst = max(rates["new sequences", above_noise] for above_noise in (20.0, 10.0))
    return common.verdict(
        options,
        digits=(f"{worst:.2%} wrong at worst, less than 5 %", worst < 0.05),
        speakers=(f"{speakers:.1%} found, at least 95 %", speakers >= 0.95),
    )


if __name__ == "__main__":
    sys.exit(main())
