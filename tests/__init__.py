"""Tests of what people rely on."""
