"""What a run did, as one page for a browser."""
