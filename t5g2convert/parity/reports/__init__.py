"""What a verification found, as data, JUnit XML and HTML."""
