"""What a recipe will need of a machine."""
