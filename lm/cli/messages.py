"""What a parser complains about, in one line: which option or key and where it was said, what was found, what to do."""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import yaml

from lm.cli import yaml_files

LONGEST = 300  # characters of a message
FOREIGN = {  # names of other programs, and of other commands
    "epochs": "trainer.max_steps",
    "steps": "trainer.max_steps",
    "max_iters": "trainer.max_steps",
    "learning_rate": "model.init_args.optimizer.init_args.lr",
    "seed": "seed_everything",
    "gpus": "trainer.devices",
    "device": "trainer.accelerator",
    "resume": "ckpt_path",
    "checkpoint": "ckpt_path",
    "ckpt": "ckpt_path",
    "ckpt_path": "init_from",  # where no run goes on, but a network's weights are wanted
    "max_tokens": "max_new_tokens",
    "val_interval": "trainer.val_check_interval",
}
OTHER_COMMANDS = {  # options that only some commands have
    "ckpt_path": "fit, validate, test, sample, export",
    "config": "fit, validate, test, gradients, plan, prepare",
    "source": "prepare, tokenizer, import",
    "output": "prepare, tokenizer, export, import",
    "format": "prepare, tokenizer, export",
    "errors": "prepare, tokenizer",
    "text_key": "prepare, tokenizer",
    "tokenizer": "prepare",
    "workers": "prepare",
    "val_fraction": "prepare",
    "verify": "prepare",
    "vocab_size": "tokenizer",
    "init_from": "fit",
    "split": "validate, test",
    "prompt": "sample",
    "prompt_file": "sample",
    "max_new_tokens": "sample",
    "num_samples": "sample",
    "temperature": "sample",
    "top_k": "sample",
    "top_p": "sample",
    "dtype": "gradients, prepare",
    "level": "gradients",
    "against": "gradients",
    "gpu": "plan",
    "mfu": "plan",
    "num_nodes": "plan",
    "devices": "plan",
    "lock": "doctor",
    "generate": "bench",
}


class Said(NamedTuple):
    """An option or a key on the command line or in a config."""

    key: str
    value: str | None
    place: str = ""
    """The file and line, where it was not said on the command line."""

    def __str__(self) -> str:
        return f"{self.place}{shortened(self.key, 100)}"


def said(words: Sequence[str]) -> list[Said]:
    """Return what a command line and the configs that it names say, in order."""
    found = []
    for i, word in enumerate(words):
        if not word.startswith("-") or not word.strip("-"):
            continue
        name, equals, value = word.partition("=")
        following = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else None
        one = Said(name.lstrip("-").rstrip("+"), value if equals else following)
        if name in ("-c", "--config") and one.value:
            found += _keys(one.value)
        found.append(one)
    return found


def _keys(config: str) -> list[Said]:
    try:
        return [*_walk(yaml.compose(Path(config).read_text()), "", config)]
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return []


def _walk(node: yaml.Node | None, above: str, file: str) -> Iterator[Said]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        path = f"{above}{key.value}"
        plain = value.value if isinstance(value, yaml.ScalarNode) else None
        yield Said(path, plain, f"{file}, line {key.start_mark.line + 1}: ")
        yield from _walk(value, f"{path}.", file)


def explain(
    message: str,
    words: Sequence[str],
    names: Sequence[str],
    classes: dict[str, list[str]] | None = None,
    command: str = "lm COMMAND",
) -> str:
    """Return one line for a parser's message.

    Args:
        message: What jsonargparse or Lightning says, possibly over many lines; of nested problems the innermost counts.
        words: The words of the command line.
        names: The full names of all options and keys that can be meant.
        classes: For each key that takes a class, the import paths of those that can be meant.
        command: The command's name as it was called.
    """
    return shortened(_explain(" ".join(message.split()), words, names, classes or {}, command), LONGEST)


def _explain(text: str, words: Sequence[str], names: Sequence[str], classes: dict[str, list[str]], command: str) -> str:
    there = said(words)
    keys = [*dict.fromkeys(re.findall(r"Parser key \"([\w.]+)\"", text))]
    if stray := re.match(r"unrecognized arguments: (\S+)", text):
        if stray[1].startswith("--") and len(stray[1]) > 2:
            return unknown(stray[1][2:].partition("=")[0], there, names, command)
        return _stray(stray[1], names, command)
    for pattern in UNKNOWN:
        if slip := re.search(pattern, text):
            return unknown(_joined([*keys, *slip.groups()]), there, names, command)
    if re.search(r"init_args=Namespace\(net=None|required: (?:data, )?(?:model|net)\b", text):
        return (
            "no network is said: give a recipe, --config configs/quickstart.yaml, or --model.init_args.net CLASS, or "
            "--init_from CHECKPOINT to go on with its own"
        )
    if lacks := re.search(r"class_path '([\w.]+)': the following arguments are required: (\w+)", text):
        what, example = lacks[1].split(".")[-1], f"--{_joined(keys)}.init_args.{lacks[2]}"
        return f"{_where(_joined(keys), there)} {what}: it needs {lacks[2]}: say {example} VALUE"
    if lacks := re.search(r"Requirement '([\w-]+)[^']*' not met", text):
        user = re.search(r"class_path '([\w.]+)'", text)
        what = user[1].split(".")[-1] if user else lacks[1].split("_")[-1]
        where = next((f"{one} {what}: " for one in there[::-1] if what in str(one.value)), "")
        where = "trainer.accelerator tpu: " if lacks[1] == "torch_xla" else where
        return f"{where}package {lacks[1]} is not installed: pip install {lacks[1]}"
    if missing := re.findall(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        path = ".".join(missing[0])
        near = difflib.get_close_matches(path, [one for each in classes.values() for one in each], n=1)
        return f"class_path {path}: no such class: " + (f"did you mean {near[0]}?" if near else "look at its module")
    if missing := re.findall(r"No module named '([\w.]+)'", text):
        where = next(
            (f"{one} {one.value}" for one in there[::-1] if str(one.value).startswith(missing[0])), "class_path"
        )
        return f"{where}: there is no module {missing[0]} to import"
    if unread := re.findall(r"Unable to load config \"(.*?)\"", text):
        where = next((str(one) for one in there[::-1] if one.value == unread[0]), "a section")
        return f"{where}: found {unread[0]!r}, expected a YAML mapping, or a file that has one"
    if "File does not exist" in text and (config := config_fault(words)):
        return config
    for pattern, line in SIMPLE:
        if found := re.findall(pattern, text):
            parts = found[-1] if isinstance(found[-1], tuple) else (found[-1],)
            return line.format(*(shortened(part, 120) for part in parts), command=command)
    if re.match(r"argument .*: expected (one|at least one) argument", text):
        return _no_value(words, text)
    if config := config_fault(words):
        return config
    if (value := _value(text)) is not None and keys:
        return _wrong_value(_joined(keys), value, text, there, classes, command)
    return text


UNKNOWN = (  # how jsonargparse says that a name is not known
    r"[Kk]ey ['\"]([\w.]+)['\"] is not expected",
    r"[Oo]ption ['\"]([\w.]+)['\"] is not",
    r"No action for key ['\"]([\w.]+)['\"]",
    r"does not accept nested key ['\"]([\w.]+)['\"]",
    r"Group '([\w.]+)' does not accept option '(.+?)'",
)
ACCELERATOR = "see lm doctor; say --trainer.accelerator cpu, or auto for the fastest that there is"
SIMPLE = (  # what needs nothing but the message's own words
    (
        r"Importing '([\w.]+)' is not allowed",
        "class_path {0}: it is not allowed here, as it could run any code: name a class of your own",
    ),
    (
        r"`(\w+)` requires `([\w-]+)`.*pip install",
        "trainer.callbacks {0}: package {1} is not installed: pip install {1}",
    ),
    (r"File does not exist: '?([^']+)'?", "{0}: no such file"),
    (r"^the following arguments are required: (\w+)", "--{0} is missing: see {command} --help"),
    (r"argument (--\w+): ignored explicit argument", "{0} takes no value: say {0} alone"),
    (r"Invalid option \"(.*)\" for --print_config", "--print_config={0}: say --print_config alone"),
    (r"value for the `profiler` parameter", "trainer.profiler: say simple, advanced or pytorch"),
    (r"`Timer\(duration='?(.*?)'?\)`", "trainer.max_time {0}: say days:hours:minutes:seconds, as 00:12:00:00"),
    (r"`gradient_clip_algorithm` (\S+) is invalid", "trainer.gradient_clip_algorithm {0}: say norm"),
    (r"`Trainer\(devices=(.*?)\)` value is not", "trainer.devices {0}: say how many processes: 1 or more, or auto"),
    (
        r"pip install -U deepspeed",
        "trainer.strategy deepspeed: it is not installed: say fsdp2 or pip install deepspeed",
    ),
    (r"No supported gpu backend found", f"trainer.accelerator gpu: torch finds no GPU here: {ACCELERATOR}"),
    (
        r"invalid accelerator name: `accelerator='?(.*?)'?`\.",
        "trainer.accelerator {0}: say auto, cpu, gpu, cuda or mps",
    ),
    (r"invalid strategy name: `strategy='?(.*?)'?`\.", "trainer.strategy {0}: say auto, ddp or fsdp2"),
    (r"`devices` selected with .* should be an int > 0", "trainer.devices: say how many processes: 1 or more, or auto"),
    (r"`num_nodes` must be a positive integer, but got (\S+?)\.?$", "trainer.num_nodes {0}: it must be at least 1"),
    (r"You requested gpu: (\[.*\])", f"trainer.devices {{0}}: this machine has not all of these GPUs: {ACCELERATOR}"),
)


def unknown(key: str, there: Sequence[Said], names: Sequence[str], command: str) -> str:
    """Return the line for an unknown option or key, with the full name that may have been meant."""
    plain = {_plain(name): name for name in names}
    one = next((one for one in there[::-1] if _plain(one.key) == _plain(key)), Said(key, None))
    name = one.key.replace("-", "_")
    meant = _same(_plain(key).replace("-", "_"), plain)
    if meant is None and name in OTHER_COMMANDS:
        return f"unknown option or key {one}: it is an option of lm {OTHER_COMMANDS[name]}, not of {command}"
    meant = meant or _near(_plain(key), plain)
    meant = None if meant == one.key else meant  # the class in this recipe has no such name
    hint = f"did you mean {meant}?" if meant else f"see {command} --help"
    return f"{one.place}unknown option or key {shortened(one.key, 100)}: {hint}"


def _same(key: str, known: dict[str, str]) -> str | None:
    """Return the full name of a key in another spelling, at another place, or under another program's name."""
    leaf = key.split(".")[-1]
    if key in known:  # --max-steps
        return known[key]
    if (foreign := FOREIGN.get(leaf)) in known.values() and leaf.rstrip("s") not in known:  # lm plan has --gpu
        return foreign
    places = [path for path in known if path.split(".")[-1] == leaf]
    return known[max(places, key=lambda path: difflib.SequenceMatcher(None, key, path).ratio())] if places else None


def _near(key: str, known: dict[str, str]) -> str | None:
    """Return the full name whose last part is nearest to the wrong one's; of several, the nearest in full."""
    leaves = sorted({path.split(".")[-1] for path in known})
    near = difflib.get_close_matches(key.split(".")[-1], leaves, n=1, cutoff=0.65)
    return _same(".".join([*key.split(".")[:-1], *near]), known) if near else None


def _stray(word: str, names: Sequence[str], command: str) -> str:
    """Return the line for a word that belongs to no option."""
    if word in ("-", "--"):
        return f"{word}: an option is missing behind it: see {command} --help"
    if word.startswith("-"):
        return f"unknown option {shortened(word, 60)}: options begin with two dashes: see {command} --help"
    options = {".yaml": "config", ".yml": "config", ".ckpt": "ckpt_path"}
    option = options.get(Path(word).suffix)
    if option not in names:
        option = next((one for one in ("source", "ckpt_path") if one in names and "config" not in names), None)
        option = "source" if "source" in names else option
    shown = shortened(word, 100)
    if option:
        return f"{shown}: no option stands before it: say --{option} {shown}"
    return f"{shown}: no option stands before it: see {command} --help, and quote a value that has spaces"


def _no_value(words: Sequence[str], text: str) -> str:
    """Return the line for an option without its value; parsers name only what the option is part of."""
    named = re.match(r"argument (?:-\w/)?--([\w.]+)", text)
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if (
            word.startswith("-")
            and re.match(r"-(?![\d.]|$)", following)
            and (not named or f"-{named[1]}" in word or word == "-c")
        ):
            hint = "" if following.startswith("--") else f": say {word}={following} if {following} is the value"
            return f"{word}: a value is missing behind it{hint}"
    return text


def _value(text: str) -> str | None:
    value = re.search(r"(?:Got|Given) value: (.+?)\.?(?= Given | Got value| - |$)", text)
    if value is None:
        return None
    nested = re.fullmatch(r"NestedArg\(key=.*, val=(.*)\)", value[1])
    return (nested[1] if nested else value[1]).strip("'\"")


def _wrong_value(
    key: str, value: str, text: str, there: Sequence[Said], classes: dict[str, list[str]], command: str
) -> str:
    """Return the line for a value of the wrong kind."""
    one = next((one for one in there[::-1] if _plain(one.key) == _plain(key) and one.value is not None), None)
    if one is not None and one.value is not None:
        value = one.value
    where = str(one) if one else key
    where = where if classes or (one and one.place) else f"--{where}"  # a recipe's keys have no dashes
    shown = shortened(repr(value), 60)
    place = next((place for place in classes if _plain(place) == _plain(key)), None)
    literal = re.findall(r"Literal\[(.+?)\]", text)
    if place and not literal:
        known = {path.split(".")[-1]: path for path in classes[place]}
        said = value.split(".")[-1]
        near = [name for name in known if len(said) > 3 and name.lower().startswith(said.lower())]
        near = near or difflib.get_close_matches(said, known, n=1, cutoff=0.6)
        if near and known[near[0]] != value:
            return f"{where}: found {shown}, no class that belongs there: did you mean {known[near[0]]}?"
        return f"{where}: found {shown}, expected a class by its import path, as {classes[place][0]}"
    kinds = re.findall(r"Expected an? <(?:class|enum) '(\w+)'>", text)
    kinds += [choice for choices in literal for choice in choices.split(", ")]
    kinds = [kind for kind in kinds if kind not in ("NoneType", "Namespace")]
    kinds = [kind for kind in dict.fromkeys(kinds) if f"'{kind}'" not in kinds]  # 16 and '16' are one
    if count := re.search(r"Expected a tuple with (\d+) elements", text):
        kinds = [f"a list of {count[1]}"]
    elif not kinds and (inner := re.search(r"Expected <class '(\w+)'>", text)):  # of a list's elements
        kinds = [f"{inner[1]} in it"]
    if {"int", "float"} & {*kinds} and (number := _number(value)) is not None:
        if not math.isfinite(number):
            return f"{where} is {number}: it must be a finite number"
        if number.is_integer() and abs(number) < 2**53:
            return f"{where}: found {shown}, expected {' or '.join(kinds)}: write {number:.0f}"
    return f"{where}: found {shown}, expected {' or '.join(kinds) or f'another kind: see {command} --help'}"


def _number(text: str) -> float | None:
    with suppress(ValueError):
        return float(text)
    return None


def config_fault(words: Sequence[str]) -> str | None:
    """Return what is wrong with the first invalid config: its name, the line, what to do."""
    for one in said(words):
        if one.key in ("c", "config") and one.value is not None and not one.place:
            fault = _file_fault(one.value)
            if fault:
                return f"--config {shortened(one.value or repr(''), 100)}{fault}"
    return None


def _file_fault(file: str) -> str | None:
    try:
        text = Path(file).read_bytes().decode()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        yaml_files.parse(text)
    except RecursionError:
        return ": nested too deeply to be a config"
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        return f", line {line}: byte {error.object[error.start]:#04x} is not UTF-8: a config is a YAML text"
    except IsADirectoryError:
        return ": it is a folder: name a YAML file in it"
    except (OSError, ValueError) as error:
        return f": {getattr(error, 'strerror', None) or error}: name a YAML file, as configs/quickstart.yaml"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        lines = text.splitlines()
        if line <= len(lines) and "\t" in lines[line - 1][: len(lines[line - 1]) - len(lines[line - 1].lstrip())]:
            return f", line {line}: it is indented by a tab: YAML wants spaces"
        kind = "" if isinstance(error, yaml.constructor.ConstructorError) else "the config is no YAML mapping: "
        return f", line {line}: {kind}{error.problem or error.context}"
    except yaml.YAMLError as error:  # a byte that text never has
        return f": the config is no YAML text: {' '.join(str(error).split())}"
    if node is None or (isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~")):
        return ": the config is empty: see configs/quickstart.yaml"
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        line = node.start_mark.line + 1
        return f", line {line}: the config is no YAML mapping but {kind}: see configs/quickstart.yaml"
    return None


def shortened(text: str, length: int) -> str:
    """Return a text in one line, cut to a length."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 2] + " …"


def _where(key: str, there: Sequence[Said]) -> str:
    return str(next((one for one in there[::-1] if _plain(one.key) == _plain(key)), key))


def _joined(keys: Sequence[str]) -> str:
    """Return a full key from those of nested parsers, of which the last may already be full."""
    *above, last = keys
    path = ".".join(above)
    return last if not path or last.startswith(f"{path}.") else f"{path}.{last}"


def _plain(key: str) -> str:
    """Return a key without the parts that may be left out: --model.net is --model.init_args.net."""
    return ".".join(part for part in key.split(".") if part not in ("init_args", "class_path"))
