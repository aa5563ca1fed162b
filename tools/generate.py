"""Continue text with a trained model.

    python -m tools.generate runs/debug "Once upon"
    python -m tools.generate exported --prompts prompts.txt --batch 8 --greedy --json > continued.jsonl

CHECKPOINT is a run directory (its newest checkpoint is taken), a checkpoint saved on any number of processes, or a
Hugging Face directory. Exit status: 0 done, 2 for what the user can put right, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from components import precision
from components.generation import Sampling, generate_tokens, uniform_numbers
from components.standard_streams import run_command
from components.tokenizers.detokenizer import IncrementalDetokenizer
from models.init import materialize
from recipes.config import ConfigError
from recipes.pretrained import load_pretrained


@dataclass
class Completion:
    """A prompt, and what was written after it so far."""

    prompt: str
    ids: list[int]
    """Of the prompt."""
    stream: IncrementalDetokenizer
    room: int
    """The most tokens that may follow."""
    text: str = ""
    tokens: int = 0
    ended: bool = False
    """The model ended the document."""

    def add(self, id: int | None) -> str:
        """The text that became certain with the next id; None: there is no more."""
        if self.ended or self.tokens == self.room:
            return ""
        if id is None:
            self.ended = True
            return self.finish()
        self.tokens += 1
        return self._gained(self.stream.add(id) + (self.stream.finish() if self.tokens == self.room else ""))

    def finish(self) -> str:
        """What was held back, as what it is so far."""
        return self._gained(self.stream.finish())

    def _gained(self, new: str) -> str:
        self.text += new
        return new

    def record(self) -> dict[str, Any]:
        """As JSON."""
        end = "end_of_document" if self.ended else "max_tokens" if self.tokens == self.room else "interrupted"
        return {"prompt": self.prompt, "text": self.text, "tokens": self.tokens, "end": end}


class Generator:
    """A model, its tokenizer, and how to choose."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Raises ValueError, OSError or ConfigError for what cannot be opened."""
        self.sampling = Sampling(
            temperature=0.0 if options.greedy else options.temperature, top_k=options.top_k, top_p=options.top_p
        )
        self.seed, self.max_tokens = options.seed, options.max_tokens
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine shows no CUDA device")
        trained = load_pretrained(options.checkpoint, options.tokenizer, trust_code=options.trust_code)
        self.encoder = trained.load_tokenizer()
        model = trained.build(trained.sequence_length)
        if not hasattr(model, "new_cache"):  # a model of the user's may have none
            raise ValueError(f"a {type(model).__name__} has no new_cache(padding, capacity), which generating takes")
        materialize(model, torch.device("cpu"))
        trained.load_weights(model, single_process=True)
        model.to(self.device, precision.dtype_of(precision.resolve_precision(options.precision, self.device))).eval()
        if (pack := getattr(model, "pack", None)) is not None:
            pack()
        self.model: Any = model
        self.trained_length = trained.sequence_length
        self.longest = int(getattr(getattr(model, "size", None), "max_sequence_length", trained.sequence_length))

    def open(self, prompt: str) -> Completion:
        """Raises ValueError for a prompt that leaves no room to write."""
        ids = self.encoder.encode_batch([prompt])[0].tolist() if prompt else [self.encoder.end_of_document]
        if len(ids) >= self.longest:
            raise ValueError(
                f"the prompt {prompt[:40]!r}... has {len(ids):,} tokens, and a sequence of this model at most "
                f"{self.longest:,}, one of them to write; shorten it"
            )
        room = min(self.max_tokens, self.longest - len(ids))
        return Completion(prompt, ids, IncrementalDetokenizer(self.encoder.decode, ids if prompt else ()), room)

    def write(self, texts: Sequence[Completion], first: int) -> Iterator[list[str]]:
        """What each of `texts` gains, step by step. The n-th prompt of all, `first` on, draws from seed + n."""
        steps = max(text.room for text in texts)
        numbers = [uniform_numbers(self.seed + first + row, steps) for row in range(len(texts))]
        for ids in generate_tokens(
            self.model,
            [text.ids for text in texts],
            self.sampling,
            torch.stack(numbers),
            end=self.encoder.end_of_document,
            vocab_size=self.encoder.vocab_size,
            device=self.device,
        ):
            yield [text.add(id) for text, id in zip(texts, ids, strict=True)]
        yield [text.add(None) for text in texts]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 for what the user can put right, 130 after Ctrl-C."""
    options = parse(arguments)
    try:
        prompts = read_prompts(options.prompts) if options.prompts else [options.prompt]
        generator = Generator(options)
        texts = [generator.open(prompt) for prompt in prompts]
        longest = max(len(text.ids) + text.room for text in texts)
        if longest > generator.trained_length:
            note = f"note: the model was trained on {generator.trained_length} tokens at a time"
            print(f"{note}; beyond them it writes blindly", file=sys.stderr)
        return write_all(generator, texts, options)
    except (ConfigError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def write_all(generator: Generator, texts: Sequence[Completion], options: argparse.Namespace) -> int:
    """Continue every prompt and print it: one as it comes, several when their batch is done."""
    streams = len(texts) == 1 and not options.json
    if streams:
        emit(texts[0].prompt)
    waiting = iter(texts)
    first = 0
    while batch := list(islice(waiting, options.batch)):
        status = 0
        try:
            for gained in generator.write(batch, first):
                if streams:
                    emit(gained[0])
        except KeyboardInterrupt:
            status = 130
        left = [text.finish() for text in batch]
        if streams:
            emit(left[0] + "\n")
        for number, text in enumerate([] if streams else batch, start=first + 1):
            if options.json:
                emit(json.dumps(text.record(), ensure_ascii=False) + "\n")
            else:
                emit(f"--- {number}\n{text.prompt}{text.text}\n")
        if status:
            return status
        first += len(batch)
    return 0


def emit(text: str) -> None:
    """At once; what UTF-8 cannot hold, as a question mark."""
    sys.stdout.write(text.encode("utf-8", "replace").decode())
    sys.stdout.flush()


def read_prompts(path: Path) -> list[str]:
    """A line each, blank ones left out; of `.jsonl`, what each object has under "prompt". Raises ValueError."""
    text = sys.stdin.read() if str(path) == "-" else read_utf8(path)
    # not splitlines, which also ends a line at characters that JSON and prose may have inside one
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{'standard input' if str(path) == '-' else path} holds no prompt")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            prompts.append(json.loads(line)["prompt"])
            assert isinstance(prompts[-1], str)
        except (ValueError, KeyError, TypeError, AssertionError):
            raise ValueError(f'{path}:{number}: expected an object such as {{"prompt": "Once upon"}}') from None
    return prompts


def read_utf8(path: Path) -> str:
    """Return the text without its byte-order mark. Raises ValueError, naming the line, for bytes that are not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{number} is not UTF-8 ({error.reason}); convert it, for example with iconv") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.generate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a run directory, a checkpoint or a Hugging Face directory")
    parser.add_argument("prompt", nargs="?", default="", help="text to continue (default: the start of a document)")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help='a prompt a line, or .jsonl of {"prompt"}; -: stdin'
    )
    parser.add_argument("--batch", type=at_least_one, default=8, help="prompts continued at a time (default: 8)")
    parser.add_argument("--max-tokens", type=at_least_one, default=100, help="the most to write (default: 100)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--greedy", action="store_true", help="always the most probable token")
    how.add_argument("--temperature", type=float, default=0.8, help="below 1 the probable more often (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="choose among so many tokens")
    parser.add_argument("--top-p", type=float, help="choose among the tokens that make up this probability")
    parser.add_argument("--seed", type=seed, default=0, help="prompt n of a file draws from seed + n (default: 0)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line: prompt, text, tokens, end")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="its file, if it is no longer where it was")
    parser.add_argument("--trust-code", action="store_true", help="import code of its own that CHECKPOINT names")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "float32"), default="auto", help="default: what is fast here"
    )
    options = parser.parse_args(arguments)
    if options.prompts and options.prompt:
        parser.error("a PROMPT or --prompts FILE, not both")
    return options


def seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**62:  # torch takes 63 bits, and the number of the prompt is added
        raise argparse.ArgumentTypeError(f"{number} is not from 0 to 2**62 - 1")
    return number


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


if __name__ == "__main__":
    sys.exit(run_command(main))
