"""Continue text with a trained model.

    python -m tools.generate runs/debug "Once upon"
    python -m tools.generate exported --prompts prompts.txt --batch 8 --greedy --json > continued.jsonl
    torchrun --nproc-per-node=4 -m tools.generate runs/long --prompts book.jsonl     # a prompt that fits on no device

CHECKPOINT is a run directory (its newest checkpoint is taken), a checkpoint saved on any number of processes, or a
Hugging Face directory. Several processes each have the whole model and a part of every prompt, by context parallelism.
Exit status: 0 done, 2 for a user error, 130 after Ctrl-C; torchrun has its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from components import precision
from components.distributed.context import DistributedContext
from components.distributed.context_parallel import ContextParallelRanks
from components.errors import InputError
from components.generation import Sampling, generate_tokens, uniform_numbers
from components.standard_streams import run_command
from components.token_ids import describe_start, first_input, start_of_document
from components.tokenizers.detokenizer import IncrementalDetokenizer
from recipes.config import ConfigError
from recipes.interfaces import complete_model
from recipes.model_setup import require_context_parallelism
from recipes.parallelize import materialize
from recipes.trained_model import load_pretrained


@dataclass
class Completion:
    """A prompt, and the text generated after it so far."""

    prompt: str
    ids: list[int]
    """Token ids of the prompt."""
    stream: IncrementalDetokenizer
    room: int
    """The largest number of tokens to generate."""
    text: str = ""
    tokens: int = 0
    ended: bool = False
    """Whether the model ended the document."""

    def add(self, id: int | None) -> str:
        """Add the next id, or None for the end; return the text that is now complete."""
        if self.ended or self.tokens == self.room:
            return ""
        if id is None:
            self.ended = True
            return self.finish()
        self.tokens += 1
        return self._append(self.stream.add(id) + (self.stream.finish() if self.tokens == self.room else ""))

    def finish(self) -> str:
        """Return the text that was held back as an incomplete character."""
        return self._append(self.stream.finish())

    def _append(self, delta: str) -> str:
        self.text += delta
        return delta

    def record(self) -> dict[str, Any]:
        end = "end_of_document" if self.ended else "max_tokens" if self.tokens == self.room else "interrupted"
        return {"prompt": self.prompt, "text": self.text, "tokens": self.tokens, "end": end}


class Generator:
    """A model, its tokenizer and its sampling settings."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        """Load the model of the command line. Raises ValueError, OSError or ConfigError."""
        try:
            self.sampling = Sampling(
                temperature=0.0 if options.greedy else options.temperature, top_k=options.top_k, top_p=options.top_p
            )
        except InputError as error:
            raise ValueError(f"--{error.key.replace('_', '-')} {error.message}") from None
        self.seed, self.max_tokens = options.seed, options.max_tokens
        self.device = device
        self.ranks: ContextParallelRanks | None = None
        """The processes that share each prompt."""
        trained = load_pretrained(
            options.checkpoint,
            options.tokenizer,
            average=options.average,
            add_special_tokens=not options.no_special_tokens,
            trust_code=options.trust_code,
        )
        self.encoder = trained.load_tokenizer()
        model = trained.build(trained.sequence_length)
        if not hasattr(model, "new_cache"):  # a custom model may have none
            raise ValueError(f"a {type(model).__name__} has no new_cache(padding, capacity), which generation needs")
        materialize(model, torch.device("cpu"))
        trained.load_weights(model, single_process=True)
        model.to(self.device, precision.dtype_of(precision.resolve_precision(options.precision, self.device))).eval()
        complete_model(model).use_mkldnn_linear()
        self.model: Any = model
        self.trained_length = trained.sequence_length
        self.longest = int(getattr(getattr(model, "shape", None), "max_sequence_length", trained.sequence_length))

    def enable_context_parallelism(self, processes: int) -> None:
        """Divide each prompt among this number of processes: all of them. Call on every rank.

        Raises InputError if the model does not support it.
        """
        require_context_parallelism(self.model)
        self.ranks = ContextParallelRanks(init_device_mesh(self.device.type, (processes,)))
        self.model.enable_context_parallelism(self.ranks)

    def first_ids(self, ids_B: Tensor) -> Tensor:
        """Return the ids that the first process chose: unlike processors may differ in the last bit of a logit."""
        assert self.ranks is not None
        return self.ranks.all_gather(ids_B)[0]

    def start_completion(self, prompt: str) -> Completion:
        """Start a completion. Raises ValueError for a prompt that leaves no room for another token."""
        ids = self.encoder.encode_batch([prompt])[0].tolist() if prompt else []
        if not prompt or start_of_document(self.encoder) is not None:
            ids = [first_input(self.encoder), *ids]
        if len(ids) >= self.longest:
            raise ValueError(
                f"the prompt {prompt[:40]!r}... has {len(ids):,} tokens; at most {self.longest - 1:,} leave room for "
                f"another in a sequence of {self.longest:,}; shorten it"
            )
        room = min(self.max_tokens, self.longest - len(ids))
        return Completion(prompt, ids, IncrementalDetokenizer(self.encoder.decode, ids if prompt else ()), room)

    def generate(self, texts: Sequence[Completion], first: int) -> Iterator[list[str]]:
        """Yield the new texts of each step. Prompt n of all draws from seed + n; row 0 is prompt `first`."""
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
            multiple=2 * self.ranks.size if self.ranks is not None else 1,
            agree=self.first_ids if self.ranks is not None else None,
        ):
            yield [text.add(id) for text, id in zip(texts, ids, strict=True)]
        yield [text.add(None) for text in texts]


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    world = None
    try:
        with ExitStack() as cleanup:
            if options.device == "cuda" and not torch.cuda.is_available():
                raise ValueError("--device cuda: no CUDA device is available")
            world = DistributedContext.init(options.device or "auto")
            cleanup.push(world.close_unless_failed)
            generator, texts = world.main_process_first(partial(prepare, options, world))
            if world.size > 1:
                generator.enable_context_parallelism(world.size)
            if world.is_main:
                print_notes(generator, texts)
            else:  # every process computes the same text
                cleanup.enter_context(redirect_stdout(cleanup.enter_context(Path(os.devnull).open("w"))))
            return write_all(generator, texts, options)
    except (ValueError, OSError) as error:
        if world is None or world.is_main:
            print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def prepare(options: argparse.Namespace, world: DistributedContext) -> tuple[Generator, list[Completion]]:
    """Load the model and read the prompts. Raises ValueError or OSError."""
    if str(options.prompts) == "-" and world.size > 1:
        raise ValueError("--prompts -: several processes cannot all read standard input; write the prompts to a file")
    try:
        prompts = read_prompts(options.prompts) if options.prompts else [options.prompt]
        generator = Generator(options, world.device)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return generator, [generator.start_completion(prompt) for prompt in prompts]


def print_notes(generator: Generator, texts: Sequence[Completion]) -> None:
    """Print what is unusual about the lengths and the prompts."""
    if max(len(text.ids) + text.room for text in texts) > generator.trained_length:
        note = f"note: the model was trained on sequences of {generator.trained_length} tokens"
        print(f"{note}; quality beyond that is untested", file=sys.stderr)
    if (start := describe_start(generator.encoder)) is not None:
        print(f"note: prompts begin with {start}; --no-special-tokens omits it", file=sys.stderr)


def write_all(generator: Generator, texts: Sequence[Completion], options: argparse.Namespace) -> int:
    """Continue and print every prompt: a single one token by token, several batch by batch. Return the exit status."""
    streams = len(texts) == 1 and not options.json
    if streams:
        emit(texts[0].prompt)
    waiting = iter(texts)
    first = 0
    while batch := list(islice(waiting, options.batch)):
        status = 0
        try:
            for deltas in generator.generate(batch, first):
                if streams:
                    emit(deltas[0])
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
    """Write text to standard output at once, with a question mark for what UTF-8 cannot encode."""
    sys.stdout.write(text.encode("utf-8", "replace").decode())
    sys.stdout.flush()


def read_prompts(path: Path) -> list[str]:
    """Return the nonblank lines of a file, or the "prompt" of each object of a `.jsonl`. Raises ValueError."""
    text = sys.stdin.read() if str(path) == "-" else read_utf8(path)
    # splitlines would also split at characters that JSON and text may contain, such as U+2028
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{'standard input' if str(path) == '-' else path} has no prompt")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            prompts.append(json.loads(line)["prompt"])
            assert isinstance(prompts[-1], str)
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
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


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.generate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a run directory, a checkpoint or a Hugging Face directory")
    parser.add_argument("prompt", nargs="?", default="", help="text to continue (default: the start of a document)")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help='a prompt in each line, or .jsonl of {"prompt"}; -: stdin'
    )
    parser.add_argument("--batch", type=at_least_one, default=8, help="prompts continued at a time (default: 8)")
    parser.add_argument(
        "--max-tokens", type=at_least_one, default=100, help="maximum number of tokens to generate (default: 100)"
    )
    sampling = parser.add_mutually_exclusive_group()
    sampling.add_argument("--greedy", action="store_true", help="always choose the most probable token")
    sampling.add_argument(
        "--temperature", type=float, default=0.8, help="below 1 favors probable tokens (default: 0.8)"
    )
    parser.add_argument("--top-k", type=int, help="choose among this many most probable tokens")
    parser.add_argument(
        "--top-p", type=float, help="choose among the most probable tokens that have this total probability"
    )
    parser.add_argument("--seed", type=seed, default=0, help="prompt n of a file draws from seed + n (default: 0)")
    parser.add_argument("--json", action="store_true", help="print a JSON object per prompt: prompt, text, tokens, end")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer file (default: the one stored with the run)"
    )
    parser.add_argument("--no-special-tokens", action="store_true", help="do not begin prompts with the start token")
    parser.add_argument("--average", metavar="NAME", help="average of the weights to use (default: the last step)")
    parser.add_argument("--trust-code", action="store_true", help="import the custom code that CHECKPOINT names")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "float32"), default="auto", help="default: the fastest of this device"
    )
    options = parser.parse_args(arguments)
    if options.prompts and options.prompt:
        parser.error("PROMPT and --prompts were both given; give one")
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
