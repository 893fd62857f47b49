"""The ground floor: mesh axes, processes, named parameters, checked configs, whole files."""
