"""Weight formats, one file each (formats.py lists them), what they share, and attention."""
