"""Saved training state: `folder` (what is on disk), `writer` (saving), `reader` (loading), under any layout."""
