import torch

from lm.generation.engine import Engine, Request
from lm.generation.sampling import Sampler
from lm.generation.side_by_side import continued
from lm.models import GPT
from lm.tokenizers import ByteTokenizer


def test_texts_are_those_of_the_engine() -> None:
    """Of the same seeds, prompts of several lengths, some of which end."""
    torch.manual_seed(1)
    tokenizer = ByteTokenizer()
    net = GPT(tokenizer.n_vocab, 24, n_layer=1, n_head=2, n_embd=16, init_std=0.4).eval()
    torch.nn.init.constant_(net.lm_head.weight[256].detach(), 0.3)
    prompts = [[65], [66, 67, 68], [69], [70, 71, 72], [73] * 23]
    found = continued(net, prompts, [3, 4, 5, 6, 7], sampler=Sampler(), longest=9, ends=tokenizer.stops)
    requests = [
        Request(prompt=prompt, seed=seed, max_new_tokens=min(9, 25 - len(prompt)))
        for prompt, seed in zip(prompts, [3, 4, 5, 6, 7], strict=True)
    ]
    assert found == [text.tokens for text in Engine(net, tokenizer).run(requests)]
    assert len(found[-1]) <= 2 and {len(one) for one in found} - {9}
    again = continued(net, prompts[1:2], [4], sampler=Sampler(), longest=9, ends=tokenizer.stops)
    assert again == found[1:2]
