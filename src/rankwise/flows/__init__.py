"""The flows: what a command does from the first line to the last, one readable function each."""
