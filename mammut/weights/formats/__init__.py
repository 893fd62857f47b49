"""Other people's models, one module a format: configs, parameter names, tokenizers."""
