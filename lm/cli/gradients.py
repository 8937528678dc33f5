"""`lm gradients`: gradients by hand beside autograd's, or beside central differences."""

from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn

from lm.backprop import NoRuleError, atomic, check, compare
from lm.cli import common, parsing
from lm.errors import CheckError, UserError
from lm.training.parts import make_net

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENS = {  # compared at a time
    "autograd": 1024,  # enough for every kind of term, and GPT-2 small has its answer in two minutes
    "differences": 64,  # among more, some ReLU passes its kink between the two losses
}


class Compare(parsing.Recipes):
    """Parses a recipe, and what to compare."""

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
        parser.add_argument("--mode", type=Literal["train", "eval"], default="train", help="Of the network.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make no trainer: nothing is trained."""
        return None  # type: ignore[return-value]

    def batch(self, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
        """Return the recipe's network, stirred so that no term is zero, and its first batch, cut to some tokens."""
        config, data = self.config, self.datamodule
        if getattr(data, "tokenizer", None) == "inherit":
            raise UserError("data.tokenizer inherit: say a tokenizer, there is no checkpoint here")
        if config.seed is not None:
            data.seed = config.seed
        data.setup("fit")
        module = parsing.language_model(self.model)
        torch.manual_seed(data.seed)
        try:
            net = make_net(module.make_net, data.vocab_size, data.block_size).to(dtype)
            check(net)
        except (ValueError, NoRuleError) as error:
            raise UserError(f"model.net: {error}") from error
        compare.stir(net)
        tokens, targets = data.train_dataset(1)[0]
        count = max(2, TOKENS[config.against] // tokens.shape[1])
        return net.train(config.mode == "train"), tokens[:count], targets[:count]

    def run(self) -> list[compare.Row]:
        """Compare."""
        config = self.config
        dtype = DTYPES[config.dtype]
        if config.against == "differences" and (config.dtype != "float64" or config.level != "fused"):
            raise UserError("--against differences needs --dtype float64 and --level fused: fewer digits show nothing")
        if config.level == "atomic" and (config.mode != "train" or config.dtype == "bfloat16"):
            raise UserError("--level atomic is for --mode train and --dtype float64 or float32")
        net, tokens, targets = self.batch(torch.float32 if dtype == torch.bfloat16 else dtype)
        low = torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()
        with low:
            if config.against == "differences":
                return compare.against_differences(net, tokens, targets)
            if config.level == "fused":
                return compare.against_autograd(net, tokens, targets, dtype)
        try:
            return atomic.against_autograd(net, tokens, targets, dtype)
        except ValueError as error:
            raise UserError(f"--level atomic: {error}") from error


def gradients(arguments: list[str]) -> None:
    """Run `lm gradients`.

    Raises:
        CheckError: A row disagrees.
    """
    parsing.quiet()
    cli = Compare(arguments, "Compare gradients derived by hand with autograd's, parameter by parameter.")
    stream = common.output(cli.config.json)
    table = cli.run()
    width = max(len(row.name) for row in table)
    print(f"{'name':<{width}}  {'shape':<16} exact  approximate  {'maxdiff':>9}  {'relative':>9}", file=stream)
    for row in table:
        print(
            f"{row.name:<{width}}  {' × '.join(map(str, row.shape)) or '()':<16} {row.exact!s:<5}  "
            f"{row.approximate!s:<11}  {row.maxdiff:9.2e}  {row.relative:9.2e}",
            file=stream,
        )
    wrong = [row.name for row in table if not row.approximate]
    if cli.config.json:
        common.print_json({"ok": not wrong, "rows": [common.finite(asdict(row)) for row in table]})
    if wrong:
        raise CheckError(
            f"{len(wrong)} of {len(table)} gradients disagree with {cli.config.against}: {', '.join(wrong)}"
        )
    print(f"all {len(table)} gradients by hand agree with {cli.config.against}", file=stream)
