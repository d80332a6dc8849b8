"""A loaded model: what rocr reads and edits in it, and how it is loaded and checked."""
