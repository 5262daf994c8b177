"""Compiled inner loops: scalar formulas in ``bodies``, loops around them in one module a device."""
