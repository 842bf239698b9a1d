"""Adapter files beyond the plain one."""
