"""The base of all folders: mesh axes, processes, named parameters, checked configs, whole files."""
