"""Whether the scorers say what their authors' codes say, and how often people agree with them."""
