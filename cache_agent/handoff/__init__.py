"""The matching of workers that drain with workers that take their requests over; see README.md."""
