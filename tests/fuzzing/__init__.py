"""Inputs that nobody would write, and the readers that have to take or refuse each: `make fuzz`."""
