"""What processes leave behind that are killed, that lose their database, or whose disk is full."""
