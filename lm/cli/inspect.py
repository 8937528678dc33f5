"""`lm inspect`: what a recipe is made of: layers and shapes, a batch, and what a text becomes."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn

from lm import storage
from lm.cli import common, parsing, pictures, sequences
from lm.cli.messages import shortened
from lm.cli.plan import FLOPS, recipe_of, spelled
from lm.data.module import IGNORED
from lm.errors import UserError
from lm.planning import needs
from lm.tokenizers import Tokenizer, make
from lm.tokenizers.published import PUBLISHED
from lm.training.finetune import take_weights
from lm.training.parts import make_net

EXAMPLES = 8  # shown of a batch, of a chunk of nine tokens
PIECES = 40  # tokens of a text that are shown


class Inspect(parsing.Untrained):
    """Parses a recipe, and what to show."""

    command = "inspect"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the text."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--text", type=str | None, default=None, help="Is shown in tokens, of every tokenizer.")

    def network(self) -> nn.Module:
        """Return the recipe's network, without values."""
        with torch.device("meta"):
            net: nn.Module = self.recipe.make_net()
        return net

    def layers(self, net: nn.Module) -> list[dict[str, Any]]:
        """Return each layer that has no layers in it, and each with parameters of its own; tied ones count once."""
        shapes: dict[nn.Module, list[int]] = {}

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            one = output[0] if isinstance(output, tuple) else output
            if isinstance(one, Tensor):
                shapes.setdefault(module, list(one.shape))

        for module in net.modules():
            module.register_forward_hook(look)
        with torch.no_grad(), torch.device("meta"):
            tokens = torch.zeros(max(2, self.recipe.tokens[0]), *self.recipe.tokens[1:], dtype=torch.long)
            net(tokens)
        found: list[dict[str, Any]] = []
        counted: set[nn.Parameter] = set()
        for name, module in net.named_modules():
            own = set(module.parameters(recurse=False))
            if own or (module in shapes and not list(module.children())):
                kind = type(module).__name__ + " (tied)" * bool(own & counted)
                count = sum(p.numel() for p in own - counted)
                found.append({"name": name, "kind": kind, "shape": shapes.get(module, []), "parameters": count})
            counted |= own
        return found

    def batch(self) -> list[dict[str, Any]]:
        """Return the first batch's first examples: a context and its target, in ids and as text."""
        tokens, targets = self.datamodule.first_batch()
        tokenizer = self.datamodule.text_tokenizer
        special = {i: name for name, i in tokenizer.special_ids.items()}

        def example(context: Tensor, target: Tensor) -> dict[str, Any]:
            number = int(target)
            after = tokenizer.decode([number]) or special.get(number, "")
            return {"context": context.tolist(), "target": number, "text": [tokenizer.decode(context.tolist()), after]}

        if targets.ndim == 1:  # a fixed context
            pairs = list(zip(tokens, targets, strict=True))
        else:
            pairs = [(tokens[0, : t + 1], targets[0, t]) for t in range(tokens.shape[1]) if targets[0, t] != IGNORED]
        return [example(context, target) for context, target in pairs[:EXAMPLES]]

    def run(self) -> dict[str, Any]:
        """Return what is shown."""
        self.datamodule.divided(1, self.config.trainer.accumulate_grad_batches)
        self.recipe = recipe_of(self, 1)
        net = self.network()
        parameters = needs.parameters(self.recipe)
        result: dict[str, Any] = {
            "network": type(net).__name__,
            "parameters": parameters,
            "flops_per_token": needs.flops_per_token(self.recipe),
            "layers": self.layers(net),
            "tokens": list(self.recipe.tokens),
            "targets": list(self.recipe.targets),
            "batch": self.batch(),
        }
        tokens, targets = self.datamodule.first_batch()
        if targets.ndim == 2 and (shown := sequences.described(tokens[0], targets[0], self.datamodule.text_tokenizer)):
            result["sequence"] = shown
        if self.config.text is not None:
            result["text"] = tokenized(self.config.text, self.datamodule.text_tokenizer)
        return result


def draw(cli: Inspect, folder: Path) -> list[Path]:
    """Write pictures of a recipe's network and its first batch; return their paths.

    Raises:
        UserError: The folder cannot be written.
    """
    data, module = cli.datamodule, parsing.language_model(cli.model)
    torch.manual_seed(data.seed)
    net = make_net(module.make_net, data.vocab_size, data.block_size)
    if cli.config.init_from is not None:
        take_weights(net, module.make_net, data.text_tokenizer, cli.config.init_from, cli.resolved())
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, png in pictures.draw(net, data, module.make_optimizer).items():
        path = folder / f"{name}.png"
        storage.write_whole(path, png)
        written.append(path)
    return written


def tokenized(text: str, own: Tokenizer) -> list[dict[str, Any]]:
    """Return a text's tokens in the recipe's tokenizer, in bytes, and in each published one that is to be had."""
    kinds: dict[str, Any] = {"the recipe's": lambda: own, "byte": lambda: make("byte", lambda: ())}
    kinds |= {name: (lambda name=name: make(name, lambda: ())) for name in PUBLISHED}
    rows: list[dict[str, Any]] = []
    for name, maker in kinds.items():
        try:
            tokenizer = maker()
            ids = tokenizer.encode(text).tolist()
        except UserError as error:
            there = name not in PUBLISHED
            rows.append({"tokenizer": name, "error": error.text if there else f"{name}.tiktoken is not to be had here"})
            continue
        rows.append({"tokenizer": name, "ids": ids, "pieces": [tokenizer.decode([i]) for i in ids]})
    return rows


def _take(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """Return an option's value, and the words without it: a recipe has a section of the same name."""
    for i, word in enumerate(arguments):
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}="), arguments[:i] + arguments[i + 1 :]
        if word == name:
            if i + 1 == len(arguments) or arguments[i + 1].startswith("--"):
                raise UserError(f"{name}: it has no value: name a folder")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
    return None, arguments


def inspect(arguments: list[str]) -> None:
    """Run `lm inspect`."""
    parsing.quiet()
    folder, arguments = _take(arguments, "--figures")
    if folder is not None and not storage.nearest(Path(folder)).is_dir():
        raise UserError(f"--figures {folder}: {storage.nearest(Path(folder))} is a file: name a folder")
    cli = Inspect(arguments, "Show what a recipe is made of: layers and shapes, a batch, what a text becomes.")
    result = cli.run()
    stream = common.output(cli.config.json)

    def say(line: str = "") -> None:
        print(line, file=stream)

    say(
        f"{result['network']}: {result['parameters']:,} parameters, {spelled(result['flops_per_token'], FLOPS)} a token"
    )
    width = max(len(layer["name"]) for layer in result["layers"])
    for layer in result["layers"]:
        shape = " × ".join(map(str, layer["shape"]))
        say(f"{layer['name']:<{width}}  {layer['kind']:<18}  {shape:<20}  {layer['parameters']:>12,}")
    say(
        f"\na batch: tokens {' × '.join(map(str, result['tokens']))}, targets {' × '.join(map(str, result['targets']))}"
    )
    for one in result["batch"]:
        context = shortened(" ".join(map(str, one["context"])), 60)
        before, after = one["text"]
        say(f"in the context {context} the target is {one['target']}  ({shortened(before, 40)!r} → {after!r})")
    if "sequence" in result:
        say("\n" + "\n".join(sequences.lines(result["sequence"], stream)))
    for row in result.get("text", ()):
        if "error" in row:
            say(f"\n{row['tokenizer']}: {row['error']}")
            continue
        pieces, more = row["pieces"][:PIECES], len(row["ids"]) - PIECES
        say(f"\n{row['tokenizer']}: {len(row['ids'])} tokens: {'|'.join(pieces)}{f' and {more} more' * (more > 0)}")
        say(" ".join(map(str, row["ids"][:PIECES])))
    if folder is not None:
        written = draw(cli, Path(folder))
        result["figures"] = [str(path) for path in written]
        say(f"\n{len(written)} pictures in {folder}: {', '.join(path.name for path in written)}")
    if cli.config.json:
        common.print_json(result)
