"""What is kept of running requests, so that another replica can go on."""
