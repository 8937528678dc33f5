"""How much faster the dilated convolutions are: WaveNet's logits at every position, by a sliding window or in one pass.

python benchmarks/dense.py [--length 256] [--rounds 7]
"""

import argparse
import statistics
import time

import torch

from lm.models import WaveNet


def main() -> None:
    """Time both in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    net = WaveNet(27, 8).eval()
    tokens = torch.randint(27, (1, options.length))
    windows = torch.nn.functional.pad(tokens, (7, 0)).unfold(1, 8, 1)[0]  # (T, 8)

    def one_by_one() -> torch.Tensor:
        return torch.cat([net(window.unsqueeze(0)) for window in windows])  # (T, V)

    ways = {
        "a window at a time": one_by_one,
        "all windows as a batch": lambda: net(windows),
        "dilated convolutions": lambda: net.convolve(tokens)[0],
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        expected = one_by_one()
        for _ in range(options.rounds):
            for way, compute in ways.items():
                began = time.perf_counter()
                logits = compute()
                times[way].append(1000 * (time.perf_counter() - began))
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    fastest = statistics.median(times["dilated convolutions"])
    print(f"logits at {options.length} positions, context 8, median of {options.rounds} rounds\n")
    print("| way | times the dilated convolutions | ms |\n| --- | --- | --- |")
    for way, found in times.items():
        median = statistics.median(found)
        print(f"| {way} | {median / fastest:.1f} | {median:.2f} |")


if __name__ == "__main__":
    main()
