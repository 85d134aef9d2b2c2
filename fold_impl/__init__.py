"""Parallel folding for MoE training: dense weights over tp x dp, experts over ep x etp x edp."""

from fold_impl.config import ConfigError
from fold_impl.engine import initialize

__all__ = ["ConfigError", "initialize"]
