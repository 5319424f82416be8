"""The built-in judges: a detector that looks for what prompts name, and a model that is asked about the pictures."""
