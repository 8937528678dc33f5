"""GPT: a decoder-only transformer, from one attention head to GPT-2 XL and LLaMA's layout.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019); Vaswani et al., "Attention Is All You
Need" (2017). Parameter names are GPT-2's (wte, wpe, h, ln_1, attn.c_attn, …).

Shapes: B batch, T time, C channels (n_embd), H heads, D channels of a head (C/H), V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lm.bounds import checked
from lm.models.attention import Attention, CausalSelfAttention, SeparateHeads, make_attention
from lm.models.cache import Cache
from lm.models.dropout import Dropout
from lm.models.feed_forward import FeedForward, activated, make_feed_forward
from lm.models.layers import check_heads, check_length, initialise, rescale
from lm.models.masks import same_document
from lm.models.norms import Norm, make_norm
from lm.models.rotary import Rotary
from lm.models.shift import TokenShift

NormPosition = Literal["pre", "post"]
Positions = Literal["learned", "rotary", "none"]


class Block(nn.Module):
    """Communication, then computation; by default each adds to the residual stream and reads it through a norm."""

    def __init__(
        self,
        *,
        attn: nn.Module,
        mlp: nn.Module | None,
        norms: tuple[nn.Module, nn.Module],
        norm_position: NormPosition = "pre",
        residual: bool = True,
        shifts: tuple[TokenShift | None, TokenShift | None] = (None, None),
    ) -> None:
        super().__init__()
        self.post = norm_position == "post"
        self.residual = residual
        self.ln_1 = norms[0]
        self.shift_1 = shifts[0]
        self.attn = attn
        if mlp is not None:
            self.ln_2 = norms[1]
            self.shift_2 = shifts[1]
        self.mlp = mlp

    def parts(self, *context: Any) -> list[tuple[nn.Module, TokenShift | None, nn.Module, tuple[Any, ...]]]:
        """Return what each branch is made of: its norm, its token shift, f, and what f takes beside its input."""
        first = (self.ln_1, self.shift_1, self.attn, context)
        return [first] if self.mlp is None else [first, (self.ln_2, self.shift_2, self.mlp, ())]

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Map the residual stream (B, T, C) to (B, T, C).

        A mask, or a mask, positions and a cache, go to attention and to the shifts.

        Each branch gives x + f(shift(norm(x))), or with post-norm norm(x + f(shift(x))); without residual, the same
        without "x +".
        """
        for norm, shift, f, more in self.parts(*context):
            y = x if self.post else norm(x)
            y = y if shift is None else shift(y, *context)
            y = f(y, *more)
            y = x + y if self.residual else y
            x = norm(y) if self.post else y
        return x


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The settings of a `GPT` that blocks are made of, or that depend on each other; see there.

    `lm.bounds` has checked each number by itself.

    Raises:
        ValueError: Names a setting, its value and what to do.
    """

    n_embd: int
    n_head: int
    n_kv_head: int | None
    attention: Attention
    attention_bias: bool | None
    qk_norm: bool
    projection: bool
    dropout: float
    key_dropout: bool
    bias: bool
    document_end: int | None
    token_shift: bool
    feed_forward: FeedForward
    hidden_size: int | None
    residual: bool
    norm: Norm
    norm_position: NormPosition
    norm_eps: float
    positions: Positions
    base_width: int | None
    tie_weights: bool
    init_std: float | None

    def __post_init__(self) -> None:
        """Check them."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} is {getattr(self, name)}: choose from {', '.join(get_args(choices))}")
        check_heads(self.n_embd, self.n_head)
        if self.attention == "separate":
            self._check_separate()
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}: choose one of its divisors"
            )
        if self.norm == "none" and self.norm_position == "post":
            raise ValueError("norm_position post with norm none: there is nothing to place; choose norm layer or rms")
        if self.base_width is not None and (self.tie_weights or self.init_std is None):
            raise ValueError(
                f"base_width {self.base_width} needs tie_weights false and an init_std: head and embedding differ"
            )

    def _check_separate(self) -> None:
        for name, off in {"n_kv_head": None, "qk_norm": False, "key_dropout": False, "document_end": None}.items():
            value = getattr(self, name)
            if value is not off:
                raise ValueError(f"{name} {value} needs attention batched, and it is separate: drop one")
        if self.positions == "rotary":
            raise ValueError("positions rotary needs attention batched, and it is separate: change one")

    def make_norm(self) -> nn.Module:
        """Return a new normalisation."""
        return make_norm(self.norm, self.n_embd, bias=self.bias, eps=self.norm_eps)

    def make_block(self, rotary: Rotary | None) -> Block:
        """Return a new block; all of them share the rotary angles."""
        common: dict[str, Any] = {"n_embd": self.n_embd, "dropout": self.dropout, "bias": self.bias}
        return Block(
            attn=make_attention(
                self.attention,
                n_head=self.n_head,
                n_kv_head=self.n_kv_head,
                attention_bias=self.attention_bias,
                projection=self.projection,
                qk_norm=self.qk_norm,
                key_dropout=self.key_dropout,
                rotary=rotary,
                **common,
            ),
            mlp=make_feed_forward(self.feed_forward, hidden_size=self.hidden_size, **common),
            norms=(self.make_norm(), self.make_norm()),
            norm_position=self.norm_position,
            residual=self.residual,
            shifts=(TokenShift(self.n_embd), TokenShift(self.n_embd)) if self.token_shift else (None, None),
        )


CHOICES = {
    "attention": Attention,
    "feed_forward": FeedForward,
    "norm": Norm,
    "norm_position": NormPosition,
    "positions": Positions,
}


class GPT(nn.Module):
    """A decoder-only transformer; the defaults are GPT-2: learned positions and pre-norm blocks.

    Args:
        vocab_size: Number of different tokens, V.
        block_size: Longest context in tokens; also the number of positions.
        n_layer: Number of blocks.
        n_head: Attention heads per block; divides n_embd.
        n_embd: Width of the residual stream, C.
        dropout: Probability of dropping an element after the embedding, in attention and on each residual branch.
        key_dropout: Whether attention drops keys of a head, each for all queries, rather than weights one by one: the
            same probability for each weight at a small part of the time on CPUs, as attention keeps its fast kernel.
        bias: Whether linear layers and LayerNorms have biases (GPT-2: yes).
        tie_weights: Whether the output head is the token embedding (GPT-2: yes).
        attention: "batched" makes all heads from one projection, "separate" has a module for each head, written out.
        attention_bias: Whether queries, keys and values have biases; as `bias` by default.
        n_kv_head: Key and value heads, each shared by n_head / n_kv_head query heads (Ainslie et al. 2023); n_head by
            default. LLaMA 3 8B has 8 for 32.
        qk_norm: Whether each head's queries and keys are RMS-normalised before their product (Henry et al. 2020).
        projection: Whether a linear layer mixes the heads' outputs.
        feed_forward: "gelu", "gelu_erf", "relu" and "relu_squared" are two layers with that activation (GPT-2's is
            "gelu", by tanh; nanoGPT's "gelu_erf", without), "swiglu" is gated, "single" one layer and a ReLU, "none"
            leaves the feed-forward network out.
        hidden_size: Width inside the feed-forward network; by default 4 n_embd, with swiglu 8/3 n_embd rounded up to a
            multiple of 8, which has as many weights.
        residual: Whether a block adds its results to its input rather than replacing it.
        norm: "layer" for LayerNorm, "rms" for RMSNorm (Zhang and Sennrich 2019), "none" for none.
        norm_position: "pre" normalises what each part of a block reads, and the last block's result; "post" normalises
            each sum, as in Vaswani et al.
        norm_eps: What a normalisation adds to the variance, or to the mean square (some LLaMAs: 1e-6).
        positions: "learned" adds an embedding of the position, "rotary" rotates queries and keys (Su et al. 2021),
            "none" leaves order to the causal mask.
        rope_theta: The base of rotary angles.
        logit_soft_cap: Bounds logits to ±this by cap · tanh(logits / cap) (Gemma 2: 30); None leaves them.
        head_bias: Whether the output head has a bias.
        document_end: Id of the end-of-text token, after which attention and token shift start anew, so that no
            document sees another; None lets a token see all earlier ones.
        token_shift: Whether attention and the feed-forward network read each channel mixed with the position before
            (see `lm.models.shift`).
        init_std: Standard deviation of initial weights; None leaves torch's own initialisation of each layer, whose
            embeddings of deviation 1 do not suit tie_weights.
        base_width: The n_embd at which initial weights are as init_std says; at another one, hidden matrices have
            init_std × √(base_width / n_embd) and the output head init_std × base_width / n_embd, so that what suits
            the one suits the other (Yang et al. 2022, "Tensor Programs V"). It needs tie_weights false; rates follow
            by ScaledAdamW or MuonAdamW. None leaves all as init_std says.

    Raises:
        ValueError: A size is not positive or does not divide what it must, dropout is outside [0, 1), a choice is
            unknown, or two settings cannot work together.
    """

    @checked()
    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        *,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        dropout: float = 0.0,
        key_dropout: bool = False,
        bias: bool = True,
        tie_weights: bool = True,
        attention: Attention = "batched",
        attention_bias: bool | None = None,
        n_kv_head: int | None = None,
        qk_norm: bool = False,
        projection: bool = True,
        feed_forward: FeedForward = "gelu",
        hidden_size: int | None = None,
        residual: bool = True,
        norm: Norm = "layer",
        norm_position: NormPosition = "pre",
        norm_eps: float = 1e-5,
        positions: Positions = "learned",
        rope_theta: float = 10000.0,
        logit_soft_cap: float | None = None,
        head_bias: bool = False,
        document_end: int | None = None,
        token_shift: bool = False,
        init_std: float | None = 0.02,
        base_width: int | None = None,
    ) -> None:
        super().__init__()
        layout = Layout(
            n_embd=n_embd, n_head=n_head, n_kv_head=n_kv_head, attention=attention, attention_bias=attention_bias,
            qk_norm=qk_norm, projection=projection, dropout=dropout, key_dropout=key_dropout, bias=bias,
            document_end=document_end, token_shift=token_shift, feed_forward=feed_forward, hidden_size=hidden_size,
            residual=residual, norm=norm, norm_position=norm_position, norm_eps=norm_eps, positions=positions,
            base_width=base_width, tie_weights=tie_weights, init_std=init_std,
        )  # fmt: skip
        self.document_end = document_end
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.logit_soft_cap = logit_soft_cap
        self.init_std = init_std
        self.width = None if base_width is None else n_embd / base_width
        rotary = None
        if positions == "rotary":
            rotary = Rotary(head_size=n_embd // n_head, block_size=block_size, theta=rope_theta)
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd) if positions == "learned" else None
        self.drop = Dropout(dropout)
        self.h = nn.ModuleList(layout.make_block(rotary) for _ in range(n_layer))
        self.ln_f = layout.make_norm() if norm_position == "pre" else nn.Identity()
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=head_bias)
        self.reset_parameters()
        if tie_weights:
            self.lm_head.weight = self.wte.weight

    def reset_parameters(self) -> None:
        """Initialise as GPT-2; where init_std is None, layers stay as torch made them."""
        if self.init_std is not None:
            initialise(self, self.init_std, {self.h: 2 * len(self.h)})
        if self.width is not None:
            rescale(self.h, self.width**-0.5)
            rescale(self.lm_head, 1 / self.width)

    def mask(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return the blocks' attention mask for tokens (B, T): an empty tuple where attention is only causal."""
        return () if self.document_end is None else (same_document(tokens, self.document_end),)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits of the token after each position.

        Args:
            tokens: int64 (B, T), at most block_size with those before.
            cache: Has what is needed of the tokens before these, and takes these; None where there are none.

        Returns:
            Logits (B, T, V); of the cache's last tokens alone where it says so.

        Raises:
            ValueError: The sequence is longer than block_size.
        """
        check_length(tokens, self.block_size)
        if cache is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
            context: tuple[Any, ...] = self.mask(tokens)
        else:
            positions, allowed = cache.place(tokens, self.document_end)  # (T,) or (B, T)
            context = allowed, positions, cache
        x = self.wte(tokens)  # (B, T) -> (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(positions)  # (B, T, C) + (T, C) or (B, T, C) -> (B, T, C)
        x = self.drop(x)
        for block in self.h:
            x = block(x, *context)
        if cache is not None and cache.last is not None:
            x = x[:, -cache.last :]  # (B, T, C) -> (B, at most last, C)
        logits = self.lm_head(self.ln_f(x))  # (B, T, C) -> (B, T, V)
        if self.logit_soft_cap is not None:
            logits = self.logit_soft_cap * activated(torch.tanh, logits / self.logit_soft_cap)
        return logits

    @torch.no_grad()
    def attention_maps(self, tokens: Tensor) -> list[Tensor]:
        """Return each block's attention weights (B, H, T, T) over tokens (B, T), without dropout.

        They are computed from the inputs of each block's attention in an ordinary forward pass.
        """
        maps: list[Tensor] = []

        def keep(attn: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(attn, CausalSelfAttention | SeparateHeads)
            maps.append(attn.weights(*inputs))

        training = self.training
        hooks = [block.attn.register_forward_pre_hook(keep) for block in self.h]  # type: ignore[union-attr]
        try:
            self.eval()(tokens)
        finally:
            self.train(training)
            for hook in hooks:
                hook.remove()
        return maps
