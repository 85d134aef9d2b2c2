"""Judge an implementation of folded mixture-of-experts training by its gradients.

Owns the version and nothing else: importing the package must stay cheap, ranks do it.
"""

__version__ = "0.1.0"
