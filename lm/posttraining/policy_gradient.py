"""PolicyGradient: a policy learned from the rewards of what it writes.

Shapes: K steps on one set of texts, B prompts of a step, G answers to each, N = B G texts, T block_size.
"""

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lm.backprop import Gradients, run
from lm.backprop.policy import clipped, log_probabilities
from lm.bounds import checked
from lm.data.chunks import draw_at
from lm.errors import UserError
from lm.posttraining import rollouts
from lm.posttraining.by_hand import ByHand, all_count
from lm.posttraining.rewards import Answer, ExactAnswer, Reward
from lm.posttraining.rollouts import LOSS_MEANS, LossMean
from lm.training import LanguageModel
from lm.training.distributed.sharding import is_sharded


class PolicyGradient(LanguageModel):
    """REINFORCE with the mean of a group as its baseline, GRPO, and PPO's clipped steps.

    In each step the policy answers each of the data's prompts several times. What is
    better than the mean of its group becomes likelier. Texts are drawn by (seed, number), so that a run that resumes
    draws the same. Dropout is off: old and new probabilities are of the same network.

    With steps_per_call K above 1, the prompts of K steps are answered at once, and K steps are taken on these texts,
    with the ratio of new to old probability clipped. Checkpoints fall between such calls, so there is nothing of them
    to save.

    Args:
        reward: Gives each answer a number; by default 1 for the answer that the data has.
        group: Answers to each prompt, G.
        clip: How far the ratio may be from 1 for a token to count.
        kl: What the reward loses for each nat by which the policy departs from the reference, the network as training
            begins. The optimum is then π_ref exp(reward / kl) / Z. 0 needs no reference.
        scale_rewards: Whether advantages are divided by the group's standard deviation, as GRPO does.
        loss_mean: What the mean is over: sum adds up a text's tokens, which is the policy gradient itself; token,
            sequence and group are means over tokens, within texts, and within groups.
        max_new_tokens: Longest answer; by default what the context holds.
        settings: All that `LanguageModel` takes.
    """

    @checked("model.", UserError)
    def __init__(
        self,
        *,
        reward: Reward | None = None,
        group: int = 8,
        clip: float = 0.2,
        kl: float = 0.0,
        scale_rewards: bool = False,
        loss_mean: LossMean = "sum",
        max_new_tokens: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if loss_mean not in LOSS_MEANS:
            raise UserError(f"model.loss_mean is {loss_mean}: choose from {', '.join(LOSS_MEANS)}")
        self.reward, self.group, self.clip, self.kl = reward or ExactAnswer(), group, clip, kl
        self.scale_rewards, self.loss_mean, self.max_new_tokens = scale_rewards, loss_mean, max_new_tokens
        self.reference: nn.Module | None = None
        self.ratio = torch.tensor([1.0, 0.0])  # of the last step: the largest, and the share of tokens that are clipped

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
        """Keep the network as training begins: the reference."""
        if self.kl:
            self.reference = copy.deepcopy(self.net).requires_grad_(False)  # type: ignore[union-attr]

    # -- a step

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor | None:
        """Let the policy answer the prompts, and learn from what its answers are worth."""
        assert self.net is not None
        self.eval()
        done, many = self.global_step, self.steps_per_call
        tokens, targets = batch if many == 1 else (one.flatten(0, 1) for one in batch[:2])  # (K B, T)
        parts, figures = self.rollouts(tokens, targets, batch_idx)
        loss = super().training_step(
            parts[0] if many == 1 else tuple(map(torch.stack, zip(*parts, strict=True))), batch_idx
        )
        every = self.trainer.log_every_n_steps or self.trainer.max_steps  # type: ignore[attr-defined]
        if done == 0 or (done + many) // every > done // every:
            figures |= dict(zip(("ratio", "clipped"), self.ratio.tolist(), strict=True))
            self.write(
                {f"train/{name}": value for name, value in figures.items()}, min(done + many, self.trainer.max_steps)
            )
        return loss

    def rollouts(
        self, tokens: Tensor, targets: Tensor, batch_idx: int
    ) -> tuple[list[tuple[Tensor, ...]], dict[str, float]]:
        """Return what the steps of a call learn from, and figures about it.

        Args:
            tokens: int64 (K B, T).
            targets: int64 (K B, T).
            batch_idx: Number of the batch in this process.

        Returns:
            For each step, tokens and targets (N, T), old log-probabilities (N, T), advantages (N, 1), weights (N, T).
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        prompts = rollouts.prompts_of(tokens, targets)
        turn = batch_idx % self.trainer.accumulate_grad_batches * self.trainer.world_size + self.trainer.global_rank
        first = (data.sequences(self.global_step) + turn * len(prompts)) * self.group
        numbers = torch.arange(first, first + len(prompts) * self.group).numpy()
        seeds = draw_at(data.seed + 1, numbers, 1 << 62).tolist()
        with self.trainer.precision_plugin.forward_context():
            answers = rollouts.written(self.net, data.text_tokenizer, prompts, seeds, self.max_new_tokens)  # type: ignore[arg-type]
        starts = [len(prompt) for prompt, _ in prompts for _ in range(self.group)]
        texts = [one.to(self.device) for one in rollouts.sequences(answers, starts, data.block_size)]  # 2 of (K N, T)
        given = torch.tensor(self._judged(answers), device=self.device)  # (K N,)
        self._note_not_finite(given, answers)
        size = len(given) // self.steps_per_call
        steps = [self._step_of(*one) for one in zip(*(whole.split(size) for whole in (*texts, given)), strict=True)]
        divergence = torch.cat([one[-1] for one in steps])
        figures = {
            "reward": float(given.mean()),
            "kl": float(divergence.mean()),
            "answer_tokens": float((texts[1] >= 0).sum() / len(given)),
            "finished": sum(one.finished for one in answers) / len(answers),
        }
        return [one[:-1] for one in steps], figures

    def _step_of(self, tokens: Tensor, targets: Tensor, given: Tensor) -> tuple[Tensor, ...]:
        """Return what a step learns from, and by how much each text's log-probability is above the reference's (N,)."""
        old = self.log_probabilities(self.net, tokens, targets)
        divergence = torch.zeros_like(given)
        if self.reference is not None:
            self.reference.requires_grad_(True)  # or its layers would take other kernels, which round otherwise
            divergence = (old - self.log_probabilities(self.reference, tokens, targets)).sum(1)
            self.reference.requires_grad_(False)
        worth = given - self.kl * divergence
        above = rollouts.above_mean(worth, self.group, scaled=self.scale_rewards).unsqueeze(1)  # (N, 1)
        weights = rollouts.token_weights(targets >= 0, self.group, self.loss_mean)
        return tokens, targets, old, above.to(old.dtype), weights.to(old.dtype), divergence

    def log_probabilities(self, net: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probabilities that a network gives to targets, by the same operations as in a step."""
        with torch.enable_grad(), self.trainer.precision_plugin.forward_context():
            return log_probabilities(net(tokens), targets)[0].detach()

    def _judged(self, answers: list[Answer]) -> list[float]:
        given: Any = self.reward(answers)
        try:
            found = [] if isinstance(given, Mapping | str) else [float(one) for one in given]
        except (TypeError, ValueError, OverflowError, RuntimeError):
            found = []
        if len(found) != len(answers):
            what = f"gives {repr(given)[:60]} for {len(answers)} answers"
            raise UserError(f"model.reward {type(self.reward).__name__} {what}: it must give a number for each")
        return found

    def _note_not_finite(self, given: Tensor, answers: list[Answer]) -> None:
        """Say which answer has a reward that is not finite; then the loss is not finite either, and the guard acts."""
        for i in (~given.isfinite()).nonzero().flatten().tolist()[:1]:
            found = f"{float(given[i])} for the answer {answers[i].text[:60]!r}"
            print(f"note: model.reward {type(self.reward).__name__} gives {found}", file=sys.stderr)

    def loss(self, *batch: Tensor) -> Tensor:
        """Return a step's loss, whose backward pass follows."""
        tokens, targets, old, above, weights = batch
        logs, _ = log_probabilities(self(tokens), targets)
        losses, dlogs = clipped(logs, old, above, self.clip)  # (N, T)
        loss = (weights * losses).sum()
        self._note_ratio(logs - old, dlogs, weights * above)
        self.step.note(loss, all_count(tokens))
        return loss

    def _note_ratio(self, moved: Tensor, dlogs: Tensor, worth: Tensor) -> None:
        """Keep the largest ratio of new to old probability, and the share of tokens that are clipped."""
        counts = worth != 0
        self.ratio = torch.stack(
            [moved.detach().max().exp(), ((dlogs == 0) & counts).sum() / counts.sum().clamp(min=1)]
        )


class ManualPolicyGradient(PolicyGradient, ByHand):
    """The same, by gradients derived by hand."""

    def log_probabilities(self, net: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probabilities that a network gives to targets, by the rules."""
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return log_probabilities(run(net, Gradients(), tokens)[0], targets)[0]

    def loss_by_hand(self, *batch: Tensor, last: bool) -> Tensor:
        """Return a step's loss, after adding its gradient: w dL/dl at each token the policy wrote."""
        tokens, targets, old, above, weights = batch
        by_hand = self._by_hand
        if last:
            by_hand.grads.last_pass()
        logits, backward = run(by_hand.net, by_hand.grads, tokens)
        logs, backward_logs = log_probabilities(logits, targets)
        losses, dlogs = clipped(logs, old, above, self.clip)
        backward(backward_logs(dlogs * weights * by_hand.division.weight(all_count(tokens), logs.dtype)))
        loss = (weights * losses).sum()
        self._note_ratio(logs - old, dlogs, weights * above)
        self.step.note(loss, all_count(tokens))
        return loss
