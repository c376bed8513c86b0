"""Merge methods, by the names that configuration files use. How to call one: method.py."""

from cabochon.merge.methods import average
from cabochon.merge.methods.method import Method

METHODS: dict[str, Method] = {method.name: method for method in (average.LINEAR, average.PASSTHROUGH)}
