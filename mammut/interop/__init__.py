"""Adapters to other libraries.

Each module needs the package it is named after; the rest of mammut does not.
"""
