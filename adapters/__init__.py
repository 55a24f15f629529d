"""Engines that route tokens, each behind the same small protocol."""
