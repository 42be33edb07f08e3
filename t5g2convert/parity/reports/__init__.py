"""The result of a verification as data, JUnit XML and HTML."""
