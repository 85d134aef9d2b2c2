"""Planted faults that the comparison must catch, and the kill matrix they make.

Owns the catalogue (`catalogue`), what a fault does at its point (`transforms`, the only module a
rank imports), the practices of the field it is measured against (`detectors`), the runs (`runs`)
and the commands (`commands`). Must not know how `parity.explain` reaches a diagnosis. Easy to get
wrong: a planted run must never enter the caches of clean ones.
"""
