"""The checks that judge a conversion, and the comparison of a model that was trained further with its parent."""
