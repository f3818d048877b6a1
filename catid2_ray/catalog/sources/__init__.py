"""Published datasets as they are, and the rules that turn them into the house schema."""
