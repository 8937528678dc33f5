"""`lm plan`: what a recipe will need from a cluster, before anything is started."""

import difflib
from functools import partial
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lm.cli import common, parsing
from lm.data.chunks import rows
from lm.errors import UserError
from lm.planning import needs
from lm.training import parts


class Plan(parsing.Untrained):
    """Parses a recipe and a cluster."""

    command = "plan"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the cluster."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--num_nodes", type=int, default=1, help="Machines.")
        parser.add_argument("--devices", type=int, default=1, help="GPUs of each.")
        parser.add_argument("--gpu", type=str, default="H100", help=f"One of {', '.join(needs.DEVICES)}.")
        parser.add_argument("--mfu", type=float, default=0.4, help="The share of the GPU's FLOP/s that is used.")

    def cluster(self) -> tuple[needs.Device, int]:
        """Return the kind of GPU and the number of processes.

        Raises:
            UserError: There is no such GPU or number.
        """
        config = self.config
        known = {name.lower(): name for name in needs.DEVICES}
        if config.gpu.lower() not in known:
            near = difflib.get_close_matches(config.gpu.lower(), known, n=1)
            hint = f"did you mean {known[near[0]]}?" if near else f"say one of {', '.join(needs.DEVICES)}"
            raise UserError(f"--gpu {config.gpu}: {hint}")
        return needs.DEVICES[known[config.gpu.lower()]], config.num_nodes * config.devices

    def run(self) -> dict[str, Any]:
        """Return the plan."""
        device, processes = self.cluster()
        recipe, config = recipe_of(self, processes), self.config
        try:
            count, flops = needs.parameters(recipe), needs.flops_per_token(recipe)
            table = needs.strategies(recipe, processes)
        except ValueError as error:
            raise UserError(f"model.net: {error}") from error
        except (RuntimeError, OverflowError) as error:  # torch's, of sizes that no tensor can have
            reason = str(error).splitlines()[0]
            raise UserError(
                f"model.net or data: no machine has tensors that large: {reason}: make it smaller"
            ) from error
        room = (device.memory - needs.RESERVED) * 1e9
        order = sorted(table, key=lambda name: ("activation" in name, "fsdp2" in name))  # the fastest that fits
        chosen = next((name for name in order if table[name].peak <= room), None)
        tokens = self.datamodule.batch_size * recipe.tokens[1]
        seconds = tokens * config.trainer.max_steps * flops / (device.flops * 1e12 * config.mfu * processes)
        weights = table["ddp"].weights
        return {
            "parameters": count,
            "flops_per_token": flops,
            "memory_gb_per_device": gigabytes(table[chosen or order[-1]].peak),
            "memory_gb": {
                name: {key: gigabytes(getattr(one, key)) for key in (*one.__dataclass_fields__, "peak")}
                for name, one in table.items()
            },
            "micro_batch_size": recipe.tokens[0],
            "accumulate_grad_batches": recipe.accumulate,
            "tokens_per_step": tokens,
            "hours": float(f"{seconds / 3600:.6g}"),
            "communication_gb_per_step": {
                name: gigabytes(size) for name, size in needs.communication(weights, processes).items()
            },
            "strategy": chosen or "none fits",
            "remedy": None if chosen else needs.remedy(recipe, room),
        }


def recipe_of(cli: parsing.Untrained, processes: int) -> needs.Recipe:
    """Return the parts of a recipe that decide what it needs, for a micro-batch of each process."""
    data, trainer = cli.datamodule, cli.config.trainer
    size = data.divided(processes, trainer.accumulate_grad_batches)
    cli.set_up_data()
    module = parsing.language_model(cli.model)
    tokens, targets = rows(data.training_examples()(0, 1))
    make_net: Any = module.make_net
    return needs.Recipe(
        partial(parts.make_net, make_net, data.vocab_size, data.block_size, counted=True),
        module.make_optimizer,
        (size * len(tokens), *tokens.shape[1:]),  # a pair is two sequences
        (size * len(targets), *targets.shape[1:]),
        str(trainer.precision or "32-true"),
        trainer.accumulate_grad_batches,
        getattr(make_net, "keywords", {}).get("n_layer"),
    )


def gigabytes(size: float) -> float:
    """Return bytes as GB, 10⁹ bytes, to six digits."""
    return float(f"{size / 1e9:.6g}")


def spelled(number: float, units: dict[str, float]) -> str:
    """Return a number in the largest unit that it fills, or the smallest there is."""
    if not number:
        return "0"
    name, size = next((one for one in units.items() if number >= one[1]), list(units.items())[-1])
    amount = number / size
    return f"{amount:,.0f} {name}" if amount >= 100 or amount == int(amount) else f"{amount:.3g} {name}"


BYTES = {"PB": 1e6, "TB": 1e3, "GB": 1.0, "MB": 1e-3, "KB": 1e-6}  # in GB
FLOPS = {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6, "kFLOP": 1e3}
TIMES = {  # in hours
    **{"years": 365 * 24.0, "days": 24.0, "hours": 1.0, "minutes": 1 / 60, "seconds": 1 / 3600},
    **{"milliseconds": 1e-3 / 3600, "microseconds": 1e-6 / 3600},
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
        f"{result['parameters']:,} parameters, {spelled(result['flops_per_token'], FLOPS)} a token; "
        f"{config.num_nodes} x {config.devices} {config.gpu}"
    )
    parts = ("weights", "gradients", "optimizer", "activations", "peak")
    say(f"{'on each device':<34}" + "".join(f"{part:>12}" for part in parts))
    for name, one in result["memory_gb"].items():
        say(f"{name:<34}" + "".join(f"{spelled(one[part], BYTES):>12}" for part in parts))
    batch = f"{result['micro_batch_size']} sequences x {config.num_nodes * config.devices} devices"
    say(f"a step: {batch} x {result['accumulate_grad_batches']} accumulated = {result['tokens_per_step']:,} tokens")
    sent = {name: spelled(size, BYTES) for name, size in result["communication_gb_per_step"].items()}
    say(f"sent by each device in a step: {sent['ddp']} by ddp, {sent['fsdp2']} by fsdp2")
    hours = spelled(result["hours"], TIMES) if result["hours"] else "next to nothing"  # a table multiplies nothing
    say(f"{config.trainer.max_steps:,} steps: {hours} of computation at {config.mfu:.0%} of the GPU's speed in 16 bits")
    say(
        f"none fits: {result['remedy']}"
        if result["strategy"] == "none fits"
        else f"use trainer.strategy {result['strategy']}"
    )
    if config.json:
        common.print_json(result)
