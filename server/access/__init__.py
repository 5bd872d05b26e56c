"""Who may use the server, and how much: keys from a file, with limits of their own."""
