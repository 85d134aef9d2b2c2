"""Adapters from installed trainers to the Protocol of `parity.implementation`.

Importing this package imports no trainer; each adapter module imports its own.
"""
