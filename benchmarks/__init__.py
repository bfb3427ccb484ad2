"""Speed and memory against peers, printed as rows."""
