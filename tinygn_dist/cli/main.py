"""The console script `tinygn`, which launch/compress.py enters too: arguments -> Config -> compress -> exit code.

Exit codes: 0 done; 2 bad input; 3 refused (a model, pattern or launch that cannot be handled); 75 asked to stop
(SIGTERM), a checkpoint is written and the same command with --resume auto goes on; 130 interrupted; 128 + N a rank was
killed by signal N; anything else is a bug of ours.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import datasets
import transformers
import transformers.modeling_gguf_pytorch_utils as gguf_reader
import yaml
from rich.console import Console
from rich.logging import RichHandler

from tinygn_dist.backends import make_backend, world_size
from tinygn_dist.backends.launcher import accelerate_arguments, launch, processes_asked
from tinygn_dist.cli.export import add_verb, export
from tinygn_dist.config import Config, Section, inner_section, load_config
from tinygn_dist.errors import Refused, Stopped, UserError
from tinygn_dist.registry import experimental
from tinygn_dist.runtime.cpu_matmul import fast_matmul

ALIASES = {
    "model": "model.name",
    "data": "data.name",
    "pattern": "prune.pattern",
    "sparsity": "prune.sparsity",
    "goal": "prune.goal",
    "criterion": "prune.criterion",
    "estimator": "prune.estimator",
    "output": "output.dir",
    "recover-steps": "recover.steps",
    "resume": "checkpoint.resume",
    "num-processes": "distributed.num_processes",
}
STOPPED = 75
SECONDS_TO_SPEAK = 20
"""how long the other ranks leave rank 0 to say what was wrong"""
EXAMPLES = """examples:
  tinygn compress --model smollm2-135m --pattern channels --sparsity 0.2 --data python-docs --output small
  tinygn compress --recipe configs/recipes/llm-unstructured-50.yaml --model ./my-model --output sparse --num-processes 2
  accelerate launch --config_file configs/accelerate/cpu.yaml launch/compress.py --model M --pattern 2:4 --output out
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments, rest = _parser().parse_known_args(argv)
    try:
        if arguments.verb == "compress":
            return _compress(arguments, _overrides(arguments, rest), argv)
        if rest:
            raise UserError(f"unknown argument {rest[0]}; see `tinygn {arguments.verb} --help`")
        if arguments.verb == "export":
            return export(arguments)
        from tinygn_dist.cli import verbs as inspection  # only these verbs need it

        look = inspection.inspect if arguments.verb == "inspect" else inspection.evaluate
        return (inspection.servable if getattr(arguments, "servable", False) else look)(arguments)
    except UserError as error:
        if arguments.debug:
            raise
        _tell(str(error))
        return 3 if isinstance(error, Refused) else 2
    except Stopped as stopped:
        _tell(f"{stopped}; go on with --resume auto")
        return STOPPED
    except KeyboardInterrupt:
        return 130


def _compress(arguments: argparse.Namespace, overrides: dict[str, Any], argv: list[str]) -> int:
    config = load_config(arguments.recipe, overrides)
    launcher = accelerate_arguments()
    asked = config.distributed.num_processes or (None if launcher is None else processes_asked(launcher))
    if asked and asked > 1 and "WORLD_SIZE" not in os.environ and launcher is None:
        code, untold = launch("tinygn_dist.cli", argv, asked)
        if untold:
            _tell(untold)
        return code
    distributed = config.distributed.model_copy(update={"num_processes": asked})
    backend = make_backend(distributed)
    _configure_logging(backend.is_main)
    from tinygn_dist.pipeline import compress

    asked_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
    with fast_matmul(backend.device):  # here, where the process is ours, and not in `compress`
        report = compress(config, backend, asked_to_stop.is_set)
    if backend.is_main:
        report.print()
    backend.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tinygn",
        description="Compress Hugging Face models inside distributed jobs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    compress = verbs.add_parser(
        "compress",
        help="compress a model and write a checkpoint that from_pretrained loads",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compress.lists_keys = True
    compress.add_argument("--recipe", help="YAML file with the keys below; configs/recipes has some to start from")
    for name, key in ALIASES.items():
        compress.add_argument(f"--{name}", help=f"short for --{key}", metavar=key.split(".")[1].upper())
    compress.add_argument("--overwrite", action="store_true", help="replace an output folder that is not empty")
    evaluate = verbs.add_parser("evaluate", help="quality, size and speed of any checkpoint")
    inspect = verbs.add_parser("inspect", help="what can be removed from a model, without loading its weights")
    for verb in (evaluate, inspect):
        verb.add_argument("model", help="hub id, folder, .gguf file, or smollm2-135m")
        verb.add_argument("--revision")
        verb.add_argument("--task", default="auto")
        verb.add_argument("--trust-remote-code", action="store_true")
        verb.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument(
        "--data", help="dataset; by default the one named in the folder's tinygn_report.json, else python-docs"
    )
    evaluate.add_argument("--samples", type=int, help="evaluation sequences")
    evaluate.add_argument("--seq-len", type=int, help="tokens per sequence")
    evaluate.add_argument("--dtype", default="auto")
    evaluate.add_argument(
        "--servable", action="store_true", help="only say which engines take the checkpoint, and why not"
    )
    evaluate.add_argument("--no-latency", action="store_true", help="skip the speed measurement")
    for verb in (compress, evaluate, inspect, add_verb(verbs)):
        verb.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _every_key() -> str:
    lines = ["every key, as --section.key VALUE or in a recipe:"]
    for section in Config.model_fields:
        lines += [f"\n  {section}:", *_keys_of(Config, section, section)]
    lines.append("\n  experiments (prune.experiments or schedule.experiments, by what uses them):")
    for name, options in experimental("OPTIONS", type[Section]).items():
        for key in options.model_fields:
            lines += _keys_of(options, key, f"experiments.{name}.{key}")
    return "\n".join(lines) + "\n"


def _keys_of(outer: type[Section], key: str, path: str) -> Iterator[str]:
    """A line for a key, or one for each key of the section that it holds."""
    inner, field = inner_section(outer, key), outer.model_fields[key]
    if inner is not None:
        for name in inner.model_fields:
            yield from _keys_of(inner, name, f"{path}.{name}")
        return
    default = "required" if field.is_required() else field.default
    yield f"    {path} [{default}]  {' '.join((field.description or '').split())}"


class _Parser(argparse.ArgumentParser):
    """Lists every key when help is asked for, and not before: experiments/ is read for it."""

    lists_keys = False

    def format_help(self) -> str:
        self.epilog = _every_key() + "\n" + EXAMPLES if self.lists_keys else self.epilog
        return super().format_help()


def _overrides(arguments: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    given = {key: getattr(arguments, name.replace("-", "_")) for name, key in ALIASES.items()}
    overrides = {key: _value(text, key) for key, text in given.items() if text is not None}
    if arguments.overwrite:
        overrides["output.overwrite"] = True
    words = list(rest)
    while words:
        word = words.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            raise UserError(
                f"unknown argument {word}; keys are written --section.key VALUE, see `tinygn compress --help`"
            )
        if not equals:
            if not words:
                raise UserError(f"--{key} needs a value")
            text = words.pop(0)
        overrides[key] = _value(text, key)
    return overrides


def _value(text: str, key: str) -> Any:
    if key in ("prune.pattern", "prune.goal", "model.name", "data.name", "output.dir"):
        return text  # YAML would read 2:4 as base-60 and a folder named 1 as a number
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _configure_logging(is_main: bool) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, markup=False)
    logging.basicConfig(
        level=logging.INFO if is_main else logging.ERROR, handlers=[handler], format="%(message)s", force=True
    )
    for noisy in ("httpx", "datasets", "accelerate", "torch", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gguf_reader.tqdm = functools.partial(gguf_reader.tqdm, disable=True)  # its bar knows no switch
    datasets.disable_progress_bars()


def _tell(message: str) -> None:
    """One line on stderr, from rank 0: once connected, ranks raise together. Before, only a node's own arguments and
    launch can be wrong, so the first rank of each node speaks. The others wait until their launcher ends them: it ends
    all at the first that fails, and that must not be before the line is out."""
    rank = os.environ.get("RANK" if world_size() > 1 else "LOCAL_RANK", "0")
    if rank == "0":
        print(f"tinygn: {message}", file=sys.stderr, flush=True)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_TO_SPEAK)


def leave(code: int) -> NoReturn:
    """End the process with an exit code. A launched rank skips the interpreter's teardown: gloo's threads sometimes
    abort in it ("terminate called without an active exception"), and a finished run would count as failed."""
    if "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
