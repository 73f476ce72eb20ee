"""Bytes on disk: strict JSONL, atomic directories, hashes, the run directory."""
