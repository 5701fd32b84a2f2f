"""Checks of finished work: collecting evidence, recomputing it, second opinions."""
