"""Forward passes that are recorded once and differentiated twice."""
