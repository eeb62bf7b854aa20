"""Formats of checkpoint files: safetensors, torch's zip files and distributed checkpoints."""
