"""What is asked of many runs: a report of their curves, a search over their settings, a fit of loss against size."""
