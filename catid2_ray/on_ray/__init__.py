"""The machine: the only code that imports ray or deepspeed, one file per stage plus what they share."""
