"""From a finished checkpoint to the Hub: what is in a folder, its card, the upload in one commit, the proof."""
