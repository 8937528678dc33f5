"""What happens around training steps: checkpoints, figures, samples, signals, what the console shows."""
