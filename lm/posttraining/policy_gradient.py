"""PolicyGradient: a policy learned from the rewards of what it writes.

Shapes: K steps on one set of texts, B prompts of a step, G answers to each, N = B G texts, T block_size.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from lm.backprop import Gradients, run
from lm.backprop.policy import clipped, entropy, log_probabilities, value_error
from lm.bounds import checked
from lm.data.chunks import draw_at
from lm.errors import UserError
from lm.models.parts import precise
from lm.posttraining import rewards, rollouts
from lm.posttraining.by_hand import ByHand, all_count
from lm.posttraining.figures import StepFigures
from lm.posttraining.reward_model import scalar_head
from lm.posttraining.rewards import Answer, ExactAnswer, Reward
from lm.posttraining.rollouts import LOSS_MEANS, Experience, LossMean
from lm.training import LanguageModel
from lm.training.callbacks.samples import write_text
from lm.training.distributed.sharding import is_sharded
from lm.training.harmless import harmless

SHOWN = 4  # texts of a logged step
SAID = 60  # symbols of an answer that a message shows


class PolicyGradient(LanguageModel):
    """REINFORCE with the mean of a group as its baseline, GRPO, and PPO.

    In each step the policy answers each of the data's prompts several times. What is better than the mean of its group
    becomes likelier; with `value`, each token that is better than a value network expected. Texts are drawn by
    (seed, number), so that a run that resumes draws the same. Dropout is off: old and new probabilities are of the same
    network.

    With steps_per_call K above 1, the prompts of K steps are answered at once, and K steps are taken on these texts,
    with the ratio of new to old probability clipped. Checkpoints fall between such calls, so there is nothing of them
    to save.

    Args:
        reward: Gives each answer a number; by default 1 for the answer that the data has.
        group: Answers to each prompt, G.
        clip: How far the ratio may be from 1 for a token to count.
        kl: What the reward loses for each nat by which the policy departs from the reference, the network as training
            begins. The optimum is then π_ref exp(reward / kl) / Z. 0 needs no reference.
        entropy: What a nat of a prediction's entropy is worth, which keeps the policy from deciding too early.
        value: What the value network's error weighs in the loss. It is a second network, a copy of the first one with
            a single output, which learns what is earned from each token on: the baseline of PPO. 0 is for none.
        gae: λ of generalised advantage estimation: 1 believes what a text earned, 0 what the value network expects
            after the next token.
        scale_rewards: Whether advantages are divided by the group's standard deviation, as GRPO does.
        loss_mean: What the mean is over: sum adds up a text's tokens, which is the policy gradient itself; token,
            sequence and group are means over tokens, within texts, and within groups.
        max_new_tokens: Longest answer; by default what the context holds.
        settings: All that `LanguageModel` takes.
    """

    calls_matter = True
    compiles = False  # texts of other lengths would be other graphs

    @checked("model.", UserError)
    def __init__(
        self,
        *,
        reward: Reward | None = None,
        group: int = 8,
        clip: float = 0.2,
        kl: float = 0.0,
        entropy: float = 0.0,
        value: float = 0.0,
        gae: float = 0.95,
        scale_rewards: bool = False,
        loss_mean: LossMean = "sum",
        max_new_tokens: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if loss_mean not in LOSS_MEANS:
            raise UserError(f"model.loss_mean is {loss_mean}: choose from {', '.join(LOSS_MEANS)}")
        if not value and group < 2:
            raise UserError(
                f"model.group is {group}: it must be at least 2, as answers are compared; or say model.value"
            )
        if value and scale_rewards:
            raise UserError(
                "model.scale_rewards: with model.value, a group is no baseline: set it to false, or model.value to 0"
            )
        if gae != 0.95 and not value:
            raise UserError(f"model.gae {gae} is for a value network: say model.value, or leave it out")
        self.reward, self.group, self.clip, self.kl = reward or ExactAnswer(), group, clip, kl
        self.entropy, self.value, self.gae = entropy, value, gae
        self.scale_rewards, self.loss_mean, self.max_new_tokens = scale_rewards, loss_mean, max_new_tokens
        self.reference: nn.Module | None = None
        self.critic: nn.Module | None = None
        self.figures = StepFigures()
        self.answers: list[tuple[float, Answer]] = []  # of the last call, and their rewards
        self.causes = [""] * self.steps_per_call
        """Why the loss of each step of a call cannot be finite: a reward that is not; "" where it is."""

    def setup(self, stage: str) -> None:
        """Refuse what does not go together."""
        super().setup(stage)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if is_sharded(self.trainer):
            raise UserError("trainer.strategy fsdp2: a policy writes texts by its whole network: use ddp")
        if getattr(data, "packed", False):
            raise UserError("data.packed: a policy answers one prompt at a time: set it to false")
        if self.step.guard.spike is not None:
            raise UserError("model.spike: a policy's loss is about 0, of either sign, so none stands out: drop it")
        parts = self.trainer.world_size * self.trainer.accumulate_grad_batches
        if self.loss_mean == "token" and parts > 1:
            raise UserError(
                f"model.loss_mean token: the mean is over a step's tokens, and here {parts} parts share a step: use "
                "sequence"
            )

    def on_train_start(self) -> None:
        """Refuse a checkpoint from within a set of texts."""
        super().on_train_start()
        if self.global_step % self.steps_per_call:
            raise UserError(
                f"model.steps_per_call {self.steps_per_call}: so many steps are taken on one set of texts, and the "
                f"checkpoint is of step {self.global_step}, which is within a set: use one at a multiple"
            )

    def configure_model(self) -> None:
        """Build the network; raises UserError where the data has no prompts, or the reward another vocabulary."""
        if self.net is None:
            super().configure_model()
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            self.reward.check(data.text_tokenizer, data.block_size)
            _, targets = data.training_examples()(0, 1)[:2]
            if targets.ndim != 2 or targets[0, 0] >= 0:
                raise UserError(
                    f"model {type(self).__name__} answers prompts, and data {type(data).__name__} has none: use "
                    "ArithmeticData or ChatData"
                )

    def change_network(self) -> None:
        """Keep the network as training begins, the reference; and make the value network, another copy of it."""
        if self.kl:
            self.reference = copy.deepcopy(self.net).requires_grad_(False)  # type: ignore[union-attr]
        if self.value:
            self.critic = copy.deepcopy(self.net)
            scalar_head(self.critic)  # type: ignore[arg-type]

    @property
    def fitted(self) -> list[nn.Module]:
        """The policy, and the value network."""
        return super().fitted + ([] if self.critic is None else [self.critic])

    # -- a step

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor | None:
        """Let the policy answer the prompts, and learn from what its answers are worth."""
        self.step.decide()
        self.eval()
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.causes = [""] * self.steps_per_call
        several = self.steps_per_call > 1
        tokens, targets = (one.flatten(0, 1) for one in batch[:2]) if several else batch  # (K B, T)
        steps = self.rollouts(tokens, targets, batch_idx)
        stacked = tuple(map(torch.stack, zip(*steps, strict=True))) if several else steps[0]
        return super().training_step(stacked, batch_idx)

    def rollouts(self, tokens: Tensor, targets: Tensor, batch_idx: int) -> list[Experience]:
        """Return what each step of a call learns from.

        Args:
            tokens: int64 (K B, T).
            targets: int64 (K B, T).
            batch_idx: Number of the batch in this process.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        prompts = rollouts.prompts_of(tokens, targets)
        turn = batch_idx % self.trainer.accumulate_grad_batches * self.trainer.world_size + self.trainer.global_rank
        first = (data.sequences(self.global_step) + turn * len(prompts)) * self.group
        numbers = torch.arange(first, first + len(prompts) * self.group).numpy()
        seeds = draw_at(data.seed + 1, numbers, 1 << 62).tolist()
        with self.trainer.precision_plugin.forward_context():
            lengths = self.max_new_tokens, self.reward.readable
            answers = rollouts.written(self.net, data.text_tokenizer, prompts, seeds, *lengths)  # type: ignore[arg-type]
        starts = [len(prompt) for prompt, _ in prompts for _ in range(self.group)]
        texts = [one.to(self.device) for one in rollouts.sequences(answers, starts, data.block_size)]  # 2 of (K N, T)
        given = torch.tensor(rewards.judged(self.reward, answers), device=self.device)  # (K N,)
        found = self._not_finite(given, answers)
        self.causes = [one or other for one, other in zip(self.causes, found, strict=True)]
        ended = torch.tensor([float(one.finished) for one in answers], device=self.device)
        self.answers = [*zip(given.tolist(), answers, strict=True)]
        size = len(given) // self.steps_per_call
        parts = zip(*(whole.split(size) for whole in (*texts, given, ended)), strict=True)
        return [self._step_of(*part) for part in parts]

    def _step_of(self, tokens: Tensor, targets: Tensor, given: Tensor, ended: Tensor) -> Experience:
        """Return what a step learns from, of texts (N, T) and their rewards (N,)."""
        counts = targets >= 0
        old = self.log_probabilities(self.net, tokens, targets)
        apart = torch.zeros_like(old)  # by how much a token is likelier than by the reference
        if self.reference is not None:
            self.reference.requires_grad_(True)  # or its layers would take other kernels, which round otherwise
            apart = old - self.log_probabilities(self.reference, tokens, targets)
            self.reference.requires_grad_(False)
        earned = rollouts.token_rewards(given.to(old.dtype), self.kl * apart, counts)  # (N, T)
        if self.critic is None:
            better = rollouts.above_mean(earned.sum(1), self.group, scaled=self.scale_rewards)  # (N,)
            better = better.unsqueeze(1).expand_as(earned)
        else:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                values = precise(self.critic(tokens)[..., 0])  # (N, T, 1) -> (N, T)
            better = rollouts.advantages(earned, values, counts, self.gae)
            earned = better + values
        weights = rollouts.token_weights(counts, self.group, self.loss_mean).to(old.dtype)
        about = torch.stack([given, apart.sum(1).to(given), ended], dim=1)  # (N, 3)
        return Experience(tokens, targets, old, better, earned, weights, about)

    def log_probabilities(self, net: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probabilities that a network gives to targets, by the same operations as in a step."""
        with torch.enable_grad(), self.trainer.precision_plugin.forward_context():
            return log_probabilities(net(tokens), targets)[0].detach()

    def _not_finite(self, given: Tensor, answers: list[Answer]) -> list[str]:
        """Return of each step of a call which reward is not finite, on any process; "" where none is."""
        steps = self.steps_per_call
        # the first such reward of each step, and its answer's symbols: tensors are what processes can exchange
        rows = torch.zeros(steps, 1 + SAID, device=self.device)
        for i in (~given.isfinite()).nonzero().flatten().tolist()[::-1]:
            symbols = [float(ord(symbol)) for symbol in answers[i].text[:SAID].ljust(SAID, "\0")]
            rows[i * steps // len(answers)] = torch.tensor([float(given[i]), *symbols])
        found = []
        for of_ranks in self.trainer.strategy.all_gather(rows).reshape(-1, steps, 1 + SAID).unbind(1):
            wrong = next((row for row in of_ranks.tolist() if not math.isfinite(row[0])), None)
            found.append("")
            if wrong is not None:
                text = "".join(chr(int(one)) for one in wrong[1:] if one)
                name = f"model.reward {type(self.reward).__name__}"
                found[-1] = f"{name} gives {wrong[0]} for the answer {text!r}, and it must be finite"
        return found

    def loss(self, *batch: Tensor) -> Tensor:
        """Return a step's loss, whose backward pass follows."""
        step = Experience(*batch)
        logits = self(step.tokens)
        logs, _ = log_probabilities(logits, step.targets)
        losses, dlogs = clipped(logs, step.old, step.advantages, self.clip)  # (N, T)
        spread, _ = entropy(logits if self.entropy else logits.detach(), step.targets)
        losses = losses - self.entropy * spread
        errors = torch.zeros_like(losses)
        if self.critic is not None:
            errors, _ = value_error(precise(self.critic(step.tokens)[..., 0]), step.earned)
            losses = losses + self.value * errors
        loss = (step.weights * losses).sum()
        self._note(loss, step, logs, dlogs, spread, errors)
        return loss

    # -- what is logged

    @torch.no_grad()
    def _note(
        self, loss: Tensor, step: Experience, logs: Tensor, dlogs: Tensor, spread: Tensor, errors: Tensor
    ) -> None:
        """Keep a micro-batch's loss, and figures of it, until the step ends; tell the guard of its rewards."""
        self.step.decide()  # of the step before, which has another cause
        self.step.guard.cause = self.causes[self.global_step % self.steps_per_call]
        self.step.note(loss, all_count(step.tokens))
        counts = step.targets >= 0
        figures = dict(zip(("reward", "kl", "finished"), step.about.unbind(1), strict=True))
        figures |= {"answer_tokens": counts.sum(1), "entropy": spread[counts]}
        figures["clipped"] = ((dlogs == 0) & (step.advantages != 0))[counts]
        if self.critic is not None:
            figures["value_loss"] = errors[counts]
        self.figures.update((logs - step.old)[counts].exp(), **figures)

    def _finished(self, number: int) -> None:
        """Give the loggers a step's figures; and TensorBoard the first of its texts, with their rewards."""
        super()._finished(number)
        if self.step.is_logged(number):
            each = len(self.answers) // self.steps_per_call
            first = (number - 1) % self.steps_per_call * each
            self._show(self.answers[first : first + SHOWN], number)
            self.write({f"train/{name}": value for name, value in self.figures.compute().items()}, number)
        self.figures.reset()

    @harmless
    def _show(self, answers: list[tuple[float, Answer]], number: int) -> None:
        text = "\n".join(f"{given:.4g}  {one.prompt} → {one.text}" for given, one in answers)
        write_text(self.trainer, "rollouts", text, number)


class ManualPolicyGradient(PolicyGradient, ByHand):
    """The same, by gradients derived by hand."""

    def log_probabilities(self, net: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probabilities that a network gives to targets, by the rules."""
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return log_probabilities(run(net, Gradients(), tokens)[0], targets)[0]

    def loss_by_hand(self, *batch: Tensor, last: bool) -> Tensor:
        """Return a step's loss, after adding its gradient.

        With w what a token's loss weighs, the gradient by its logits is w dL/dl times that of its log-probability, less
        w times the bonus times that of its entropy; and the gradient by its value is w times that of its error.
        """
        step, by_hand = Experience(*batch), self._by_hand
        if last:
            by_hand.grads.last_pass()
        weights = step.weights * by_hand.division.weight(all_count(step.tokens), step.weights.dtype)  # (N, T)
        logits, backward = run(by_hand.net, by_hand.grads, step.tokens)
        logs, backward_logs = log_probabilities(logits, step.targets)
        losses, dlogs = clipped(logs, step.old, step.advantages, self.clip)
        spread, backward_spread = entropy(logits, step.targets)
        losses = losses - self.entropy * spread
        dlogits = backward_logs(weights * dlogs)
        if self.entropy:
            dlogits += backward_spread(-self.entropy * weights)
        backward(dlogits)
        errors = torch.zeros_like(losses)
        if self.critic is not None:
            values, backward = run(self.critic, by_hand.grads, step.tokens)  # (N, T, 1)
            errors, dvalues = value_error(precise(values[..., 0]), step.earned)
            losses = losses + self.value * errors
            backward((self.value * weights * dvalues).unsqueeze(-1))
        loss = (step.weights * losses).sum()
        self._note(loss, step, logs, dlogs, spread, errors)
        return loss
