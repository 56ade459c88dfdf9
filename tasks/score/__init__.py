"""Stage score: every variant's and baseline's score of every image."""
