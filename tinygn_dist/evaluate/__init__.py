"""How good is it, how fast, and where does it run?"""
