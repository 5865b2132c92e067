"""Shortest plans for compiled games."""
