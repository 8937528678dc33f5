"""`lm plan`: what a recipe will need of a cluster, before anything is started."""

import difflib
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lm.cli import common, parsing
from lm.errors import UserError
from lm.training import planning
from lm.training.parts import make_net


class Plan(parsing.Recipes):
    """Parses a recipe and a cluster."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the cluster."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--num_nodes", type=int, default=1, help="Machines.")
        parser.add_argument("--devices", type=int, default=1, help="GPUs of each.")
        parser.add_argument("--gpu", type=str, default="H100", help=f"One of {', '.join(planning.DEVICES)}.")
        parser.add_argument("--mfu", type=float, default=0.4, help="The share of the GPU's FLOP/s that is used.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make no trainer: nothing is trained."""
        return None  # type: ignore[return-value]

    def cluster(self) -> tuple[planning.Device, int]:
        """Return the kind of GPU and the number of processes.

        Raises:
            UserError: There is no such GPU or number.
        """
        config = self.config
        known = {name.lower(): name for name in planning.DEVICES}
        if config.gpu.lower() not in known:
            near = difflib.get_close_matches(config.gpu.lower(), known, n=1)
            hint = f"did you mean {known[near[0]]}?" if near else f"say one of {', '.join(planning.DEVICES)}"
            raise UserError(f"--gpu {config.gpu}: {hint}")
        return planning.DEVICES[known[config.gpu.lower()]], config.num_nodes * config.devices

    def recipe(self, processes: int) -> planning.Recipe:
        """Return what of the recipe counts, for a micro-batch of each process."""
        data, trainer = self.datamodule, self.config.trainer
        if getattr(data, "tokenizer", None) == "inherit":
            raise UserError("data.tokenizer inherit: say a tokenizer, there is no checkpoint here")
        size = data.divided(processes, trainer.accumulate_grad_batches)
        data.setup("fit")
        module = parsing.language_model(self.model)
        tokens, targets = data.train_dataset(1)[0]
        return planning.Recipe(
            lambda: make_net(module.make_net, data.vocab_size, data.block_size),
            module.make_optimizer,
            (size, *tokens.shape[1:]),
            (size, *targets.shape[1:]),
            str(trainer.precision or "32-true"),
            trainer.accumulate_grad_batches,
        )

    def run(self) -> dict[str, Any]:
        """Return the plan."""
        device, processes = self.cluster()
        recipe, config = self.recipe(processes), self.config
        try:
            count, flops = planning.parameters(recipe), planning.flops_per_token(recipe)
        except ValueError as error:
            raise UserError(f"model.net: {error}") from error
        table: dict[str, planning.Memory] = {}
        for suffix, again in {"": False, " + activation_checkpointing": True}.items():
            try:
                alone = planning.memory(recipe, recompute=again)
            except UserError:  # this network has no blocks
                continue
            table["ddp" + suffix] = planning.copied(alone, processes)
            table["fsdp2" + suffix] = planning.sharded(recipe, alone, processes)
        room = (device.memory - planning.RESERVED) * 1e9
        order = sorted(table, key=lambda name: ("activation" in name, "fsdp2" in name))  # the fastest that fits
        chosen = next((name for name in order if table[name].peak <= room), None)
        tokens = self.datamodule.batch_size * recipe.tokens[1]
        seconds = tokens * config.trainer.max_steps * flops / (device.flops * 1e12 * config.mfu * processes)
        weights = table["ddp"].weights
        return {
            "parameters": count,
            "flops_per_token": flops,
            "memory_gb_per_device": round(table[chosen or order[-1]].peak / 1e9, 3),
            "memory_gb": {
                name: {key: round(getattr(one, key) / 1e9, 4) for key in (*one.__dataclass_fields__, "peak")}
                for name, one in table.items()
            },
            "micro_batch_size": recipe.tokens[0],
            "accumulate_grad_batches": recipe.accumulate,
            "tokens_per_step": tokens,
            "hours": float(f"{seconds / 3600:.6g}"),
            "communication_gb_per_step": {
                name: round(size / 1e9, 4) for name, size in planning.communication(weights, processes).items()
            },
            "strategy": chosen or "none fits",
        }


def plan(arguments: list[str]) -> None:
    """Run `lm plan`."""
    parsing.quiet()
    cli = Plan(arguments, "Say what a recipe needs of a cluster: memory, hours, strategy. Nothing is trained.")
    result, config = cli.run(), cli.config
    stream = common.output(config.json)

    def say(line: str) -> None:
        print(line, file=stream)

    say(
        f"{result['parameters']:,} parameters, {result['flops_per_token'] / 1e6:,.1f} MFLOP a token; "
        f"{config.num_nodes} x {config.devices} {config.gpu}"
    )
    say(f"{'GB on each device':<34} weights  gradients  optimizer  activations     peak")
    for name, one in result["memory_gb"].items():
        say(
            f"{name:<34} {one['weights']:7.2f}  {one['gradients']:9.2f}  {one['optimizer']:9.2f}  "
            f"{one['activations']:11.2f}  {one['peak']:7.2f}"
        )
    batch = f"{result['micro_batch_size']} sequences x {config.num_nodes * config.devices} devices"
    say(f"a step: {batch} x {result['accumulate_grad_batches']} accumulated = {result['tokens_per_step']:,} tokens")
    sent = result["communication_gb_per_step"]
    say(f"sent by each device in a step: {sent['ddp']:.2f} GB by ddp, {sent['fsdp2']:.2f} GB by fsdp2")
    say(f"{config.trainer.max_steps:,} steps: {result['hours']:,.2f} hours at {config.mfu:.0%} of the GPU's speed")
    if result["strategy"] == "none fits":
        say("none fits: more accumulate_grad_batches make the micro-batch smaller, more devices the shares")
    else:
        say(f"use trainer.strategy {result['strategy']}")
    if config.json:
        common.print_json(result)
