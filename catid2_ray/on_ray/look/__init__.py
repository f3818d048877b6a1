"""Looking before and after: a catalogue before its first recipe, a recipe before its job, a product of a release."""
