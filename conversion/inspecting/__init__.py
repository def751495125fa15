"""What a memory does on a text: recorded, and shown as a page."""
