"""`lm gradients`: compare gradients by hand with autograd's, or with central differences."""

from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from lm import log
from lm.backprop import NoRuleError, atomic, check, compare
from lm.cli import common, gradient_values, parsing, rules
from lm.data.chunks import rows
from lm.data.module import IGNORED
from lm.errors import CheckError, CommandError, UserError
from lm.training import audit
from lm.training.by_hand import compile_pass
from lm.training.compute import compiler_missing
from lm.training.finetune import take_weights
from lm.training.parts import make_net

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES = {  # micro-batches in a step
    "autograd": 4,  # one process accumulates them all, or two accumulate two each
    "differences": 1,  # BatchNorm over a few rows is not smooth
}
TOKENS = {  # compared at a time, in total
    "autograd": 1024,  # enough for every kind of term, and GPT-2 small takes only minutes
    "differences": 64,  # with more, some ReLU crosses its kink between the two losses
}


class Compare(rules.WithRules, parsing.Untrained):
    """Parses a recipe, and what to compare."""

    command = "gradients"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what only the comparison needs."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--dtype",
            type=Literal["float64", "float32", "bfloat16"],
            default="float64",
            help="Of the arithmetic; bfloat16 is that of bf16-mixed: products in bfloat16, the rest in float32.",
        )
        parser.add_argument(
            "--level",
            type=Literal["fused", "atomic"],
            default="fused",
            help="fused compares parameters; atomic every tensor of the MLP, one line of gradient each.",
        )
        parser.add_argument("--seed", type=int | None, default=None, help="The same as --seed_everything.")
        parser.add_argument(
            "--against",
            type=Literal["autograd", "differences"],
            default="autograd",
            help="differences are slopes of the loss along a random direction of each parameter, in float64.",
        )
        parser.add_argument(
            "--values",
            action="store_true",
            help="Print a corner of each tensor and of its gradient, the largest element and the norm.",
        )
        parser.add_argument("--tensor", type=str | None, default=None, help="Print those of one tensor alone.")
        parser.add_argument("--mode", type=Literal["train", "eval"], default="train", help="Of the network.")

    def batches(self, dtype: torch.dtype) -> tuple[nn.Module, list[audit.Batch]]:
        """Return the recipe's network and its first batches, cut to some tokens.

        Without a checkpoint's weights, it is perturbed so that no term is zero.
        """
        config, data = self.config, self.datamodule
        if config.seed is not None:
            data.seed = config.seed
        self.set_up_data()
        module = parsing.language_model(self.model)
        torch.manual_seed(data.seed)
        try:
            net = make_net(module.make_net, data.vocab_size, data.block_size).to(dtype)
            check(net)
        except (ValueError, NoRuleError) as error:
            raise UserError(f"model.net: {error}") from error
        if config.init_from is None:
            compare.stir(net)
        else:
            take_weights(net, module.make_net, data.text_tokenizer, config.init_from, self.resolved())
        dataset = data.train_dataset(1)
        number = BATCHES[config.against]
        count = TOKENS[config.against] // number
        batches = [audit.cut(*rows(dataset[i]), count) for i in range(number)]
        for i, (_, targets) in enumerate(batches):  # micro-batches with different numbers of targets, as in some data
            targets.view(-1)[: min(i, targets.numel() // 2)] = IGNORED
        return net.train(config.mode == "train"), batches

    def take_values(self, net: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        """Find the numbers of the first batch."""
        of = gradient_values.of_atoms if self.config.level == "atomic" else gradient_values.of_parameters
        with compare.undisturbed(net):
            self.numbers = gradient_values.chosen(of(net, tokens, targets), self.config.tensor)
        self.targets = targets

    def run(self) -> dict[str, list[compare.Row]]:
        """Compare, in each way that training computes gradients."""
        config = self.config
        dtype = DTYPES[config.dtype]
        if config.against == "differences" and (config.dtype != "float64" or config.level != "fused"):
            raise UserError("--against differences needs --dtype float64 and --level fused: fewer digits show nothing")
        if config.level == "atomic" and (config.mode != "train" or config.dtype == "bfloat16"):
            raise UserError("--level atomic is for --mode train and --dtype float64 or float32")
        if config.tensor is not None and not config["values"]:
            raise UserError(f"--tensor {config.tensor[:60]} is for --values: say that, too")
        net, batches = self.batches(torch.float32 if dtype == torch.bfloat16 else dtype)
        compiled = None
        if self.model.compiled is True:
            if missing := compiler_missing(torch.device("cpu")):
                raise UserError(f"model.compile: {missing} is missing here: set it to false")
            compiled = compile_pass()
        low = torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()
        try:
            with low:
                if config["values"]:
                    self.take_values(net, *batches[0])
                if config.against == "differences":
                    return {"one step": audit.against_differences(net, batches, compiled)}
                if config.level == "fused":
                    return audit.check(net, batches, compiled)
                return {"one batch": atomic.against_autograd(net, *batches[0])}
        except ValueError as error:
            advice = ": use --level fused" if config.level == "atomic" else ""
            raise UserError(f"--level {config.level}: {error}{advice}") from error
        except CommandError:
            raise
        except Exception as error:  # a wrong rule may raise anything
            found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise CheckError(f"the gradients by hand could not be found: {found}: LM_DEBUG=1 shows where") from error


def gradients(arguments: list[str]) -> None:
    """Run `lm gradients`.

    Raises:
        CheckError: A row disagrees.
    """
    parsing.quiet()
    cli = Compare(arguments, "Compare gradients derived by hand with autograd's, parameter by parameter.")
    stream = common.output(cli.config.json)
    tables = cli.run()
    table = next(iter(tables.values()))
    for found in tables.values():  # a row that disagrees in one table is shown from that table
        table = [b if a.approximate and not b.approximate else a for a, b in zip(table, found, strict=True)]
    width = max(len(row.name) for row in table)
    print(f"{'gradient':<{width}}  {'shape':<16}  agrees  {'difference':>10}  {'relative':>9}", file=stream)
    for row in table:
        print(
            f"{row.name:<{width}}  {' × '.join(map(str, row.shape)) or '()':<16}  "
            f"{'yes' if row.approximate else 'NO':<6}  {row.maxdiff:10.2e}  {row.relative:9.2e}"
            f"{'  every bit' if row.exact else ''}",
            file=stream,
        )
    wrong = [row.name for row in table if not row.approximate]
    if cli.config["values"]:
        gradient_values.show(cli.numbers, cli.targets, stream)
    if cli.config.json:
        result: dict[str, Any] = {"ok": not wrong, "rows": [log.finite(asdict(row)) for row in table]}
        common.print_json(result | ({"values": gradient_values.described(cli.numbers)} if cli.config["values"] else {}))
    if wrong:
        ways = [way for way, found in tables.items() if not all(row.approximate for row in found)]
        raise CheckError(
            f"{len(wrong)} of {len(table)} rows disagree with {cli.config.against} ({'; '.join(ways)}): "
            f"{', '.join(wrong)}"
        )
    names = [row.name for row in table if row.name != compare.LOSS]
    what = f"{'the loss and ' * (len(names) < len(table))}all {len(names)} gradients"
    print(f"{what} by hand agree with {cli.config.against}: {'; '.join(tables)}", file=stream)
