"""Least recently used: the expert that was wanted longest ago goes first, whole. The yardstick of every other policy."""

from __future__ import annotations

from d2moe.policy.policy import WholeExperts


class Lru(WholeExperts):
    name = "lru"
