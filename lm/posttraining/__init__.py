"""After pretraining: what a completing network is made into an assistant with."""

from lm.posttraining.dpo import DPO, ManualDPO
from lm.posttraining.policy_gradient import ManualPolicyGradient, PolicyGradient
from lm.posttraining.reward_model import ManualRewardModel, RewardModel

__all__ = ["DPO", "ManualDPO", "ManualPolicyGradient", "ManualRewardModel", "PolicyGradient", "RewardModel"]
