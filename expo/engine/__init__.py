"""Runs a plan: threads, staging, journal, resume and placement."""
