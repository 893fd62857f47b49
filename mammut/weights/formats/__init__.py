"""Third-party model formats, one module each: configs, names, tokenizers."""
