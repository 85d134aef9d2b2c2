"""How many small wrong programs the exact cells tell from the right one: `make mutation`."""
