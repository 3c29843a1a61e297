"""Which weights go?"""
