"""Pipelines and shards → numbers, pictures, one report.

Import its modules (`from eval.fid import …`), never `eval` itself, which would hide Python's own.
"""
