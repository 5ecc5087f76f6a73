"""Measurements, each beside what the machine allows and, where there are any, its peers."""
