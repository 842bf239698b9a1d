"""How long it takes, how exact it is and how far it carries: everything here only measures."""
