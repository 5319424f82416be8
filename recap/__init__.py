"""From web image shards with poor alt-text to shards with good captions."""

__version__ = "0.1.0"
